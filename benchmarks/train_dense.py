"""Trains a dense network on the training split alone and writes the weights that ship with the package.

    python benchmarks/train_dense.py --model resnet20 --data fashion-mnist --epochs 24

Writes `passdeploy/models/weights/<model>-<data>.safetensors` and a model card beside it. Validation is looked at once,
at the end; nothing is chosen on the test split.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from passdeploy import data as datasets
from passdeploy import models
from passdeploy.search.prompt import InputStage, Prompted
from passdeploy.training import Checkpoint, TrainSettings, evaluate, train

WEIGHTS = Path(__file__).parents[1] / "passdeploy" / "models" / "weights"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--epochs", type=float, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    parser.add_argument("--checkpoint", type=Path, default=None)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    data = datasets.load(args.data)
    model = Prompted(InputStage(data.preprocess), models.build(args.model, data.num_classes))
    settings = TrainSettings(epochs=args.epochs, lr=0.2, label_smoothing=0.05, seed=args.seed)
    start = time.time()

    def progress(done: int, total: int, state: str) -> None:
        if done % 100 == 0 or done == total:
            print(f"step {done}/{total} {state} {time.time() - start:.0f} s", flush=True)

    train(model, data, settings, checkpoint=Checkpoint(args.checkpoint, 60), progress=progress)
    seconds = time.time() - start
    accuracy = {"validation": evaluate(model, data.val), "test": evaluate(model, data.test)}
    print(accuracy)
    args.out.mkdir(parents=True, exist_ok=True)
    name = f"{args.model}-{args.data}"
    state = {key: value.contiguous() for key, value in model.network.state_dict().items()}
    save_file(state, args.out / f"{name}.safetensors")
    card = {
        "model": args.model,
        "data": data.name,
        "data_licence": data.licence,
        "command": f"python benchmarks/train_dense.py --model {args.model} --data {args.data} "
        f"--epochs {args.epochs:g} --seed {args.seed}",
        "seed": args.seed,
        "trained_on": f"{len(data.train)} training images (validation and test images were not trained on)",
        "settings": vars(settings),
        "accuracy": accuracy,
        "seconds": round(seconds),
        "environment": {"torch": torch.__version__, "machine": platform.machine()},
        "licence": "Apache-2.0",
    }
    (args.out / f"{name}.json").write_text(json.dumps(card, indent=2) + "\n")


if __name__ == "__main__":
    main()
