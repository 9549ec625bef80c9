"""Trains a dense network on the training split alone and writes the weights that ship with the package.

    python benchmarks/train_dense.py --model resnet20 --data fashion-mnist --epochs 24
    python benchmarks/train_dense.py --model resnet18 --size 64 --data cifar10 --epochs 3 --out benchmarks/results/dense

Writes `<out>/<model>-<data>.safetensors` (with `--size`: `<model>-<size>-<data>`) and a model card beside it.
Validation is looked at once, at the end; nothing is chosen on the test split.
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
from passdeploy.checkpoint import Checkpoint
from passdeploy.search.prompt import InputStage, Prompted
from passdeploy.training import TrainSettings, evaluate, train
from passdeploy.weights import PACKAGED, trained_for


def weights_path(folder: Path, model: str, data: str, size: int | None = None) -> Path:
    """Where the weights of a network lie, trained at an input size of its own or at the data's."""
    return folder / f"{'-'.join([model, *([str(size)] if size else []), data])}.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--size", type=int, help="input size, pixels; default: the data's")
    parser.add_argument("--epochs", type=float, default=24)
    parser.add_argument("--lr", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=PACKAGED)
    parser.add_argument("--checkpoint", type=Path, default=None)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    data = datasets.load(args.data, size=(args.size, args.size) if args.size else None)
    model = Prompted(InputStage(data.preprocess), models.build(args.model, data.num_classes))
    settings = TrainSettings(epochs=args.epochs, lr=args.lr, label_smoothing=0.05, seed=args.seed)
    start = time.time()

    def progress(done: int, total: int, state: str) -> None:
        if done % 100 == 0 or done == total:
            print(f"step {done}/{total} {state} {time.time() - start:.0f} s", flush=True)

    train(model, data, settings, checkpoint=Checkpoint(args.checkpoint, 60), progress=progress)
    seconds = time.time() - start
    accuracy = {"validation": evaluate(model, data.val), "test": evaluate(model, data.test)}
    print(accuracy)
    args.out.mkdir(parents=True, exist_ok=True)
    path = weights_path(args.out, args.model, args.data, args.size)
    state = {key: value.contiguous() for key, value in model.network.state_dict().items()}
    save_file(state, path)
    card = {
        "model": args.model,
        "data": data.name,
        "data_licence": data.licence,
        "trained_for": trained_for(data),
        "command": f"python benchmarks/train_dense.py --model {args.model} --data {args.data} "
        f"--epochs {args.epochs:g} --lr {args.lr:g} --seed {args.seed}" + (f" --size {args.size}" if args.size else ""),
        "seed": args.seed,
        "trained_on": f"{len(data.train)} training images (validation and test images were not trained on)",
        "settings": vars(settings),
        "accuracy": accuracy,
        "seconds": round(seconds),
        "environment": {"torch": torch.__version__, "machine": platform.machine()},
        "licence": "Apache-2.0",
    }
    path.with_suffix(".json").write_text(json.dumps(card, indent=2) + "\n")


if __name__ == "__main__":
    main()
