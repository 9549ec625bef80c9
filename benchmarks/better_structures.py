"""Is there a better structure than the one that PASS takes? Asked of a network that was trained under random ones.

    python benchmarks/better_structures.py --data cifar10 --latency 2x
    python benchmarks/better_structures.py --data cifar10 --latency 3x --candidates 60

The dense network is trained for a few steps under structures drawn at random near the budget, so that it is at home in
all of them, and then each candidate is judged by its divergence from the dense network's outputs on training images
that it was not trained on, with batch statistics: the joint loss of all that is removed, after some recovery. That
order follows the accuracy after fine-tuning far better than the divergence before any training does. Candidates: what
PASS's prior and allocator take, what MDP's importances and L1 take, the same with blocks made cheaper or dearer, and
random ones around them. Writes benchmarks/results/DEVICE/better-structures-DATA-BUDGET.json.
"""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("KMP_BLOCKTIME", "0")
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import numpy as np
import torch
from common import device_folder
from compare_cifar import configuration
from torch import Tensor, nn

from passdeploy.console import Ui
from passdeploy.feeding import training_batches
from passdeploy.groups import Masker, as_masks
from passdeploy.pipeline import Run
from passdeploy.placing import place
from passdeploy.search.allocator import Importance
from passdeploy.search.method import SearchContext, get_method, training_images
from passdeploy.search.prompt import InputStage, Prompted
from passdeploy.stages.search import search_context
from passdeploy.structure import Structure
from passdeploy.tasks import task_of
from passdeploy.teacher import Teacher
from passdeploy.training import (
    TrainSettings,
    autocast_dtype,
    parameter_groups,
    task_loss,
    training_device,
)
from passdeploy.workspace import write_json

MARGIN = 0.98
"""The closed loop's margin, so that structures are those that it would take."""
SPREAD = 1.0
"""Standard deviation of the noise on a group's log importance."""
BLOCKS = (0.25, 0.5, 2.0, 4.0)
"""Factors by which blocks are made cheaper or dearer against channels."""


class Judge:
    """The dense network, its masks, and the dense outputs that it is compared with."""

    def __init__(self, context: SearchContext, images: int) -> None:
        self.context, self.device = context, training_device()
        stage = InputStage(context.data.preprocess)
        self.model = Prompted(stage, copy.deepcopy(context.network))
        self.layout = place(self.model.train(), self.device, context.data.input_shape)
        self.masker = Masker(self.model, context.groups, "network.")
        dense = Prompted(InputStage(context.data.preprocess), context.network)
        self.teacher = Teacher(dense, self.device, context.data.input_shape)
        self.task = task_of(context.data)
        self.images, _ = training_images(context.data, images, 99)

    def outputs(self, structure: Structure, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the masked network, and the dense one's."""
        images = images.to(self.device, memory_format=self.layout)
        masks = as_masks(self.context.groups.canonical(structure).masks)
        dtype = autocast_dtype(self.device)
        with torch.autocast(self.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            return self.masker(masks, images), self.teacher(images)

    @torch.no_grad()
    def divergence(self, structure: Structure) -> float:
        """Mean over the held-out images."""
        total = 0.0
        for part in self.images.split(256):
            got, expected = self.outputs(structure, part)
            total += float(self.task.divergence(got.float(), expected)) * len(part)
        return total / len(self.images)

    def train(self, draw: Callable[[float], Structure], steps: int, seed: int) -> None:
        """A structure drawn anew at every step; the budget tightens over the first third."""
        settings = TrainSettings(lr=0.05, distill=0.5, seed=seed + 1)
        optimiser = torch.optim.SGD(
            parameter_groups(self.model, settings.weight_decay), lr=0.0, momentum=0.9, nesterov=True
        )
        for step, images, labels in training_batches(self.context.data, settings.batch, settings.seed, steps):
            for group in optimiser.param_groups:
                group["lr"] = settings.lr * min(1.0, (step + 1) / 10) * (1.0 if step < 0.7 * steps else 0.5)
            got, expected = self.outputs(draw(max(0.0, 1 - 3 * step / steps) ** 3), images)
            loss = task_loss(self.task, got, labels.to(self.device), expected, settings)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self.model.parameters(), 5.0)
            optimiser.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--latency", default="2x")
    parser.add_argument("--candidates", type=int, default=30, help="random ones, beside those that are named")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.epochs, args.search_epochs = 1.0, 0.43  # of the comparison; nothing here depends on them
    rng = np.random.default_rng(args.seed)
    with tempfile.TemporaryDirectory(prefix="passdeploy-") as folder:
        run = Run(configuration(args, args.latency), Path(folder) / "run", Ui())
        run.shared("dense")
        run.shared("profile")
        context = search_context(run)
    allocator, (ratio,) = context.allocator("latency"), context.ratios
    named: dict[str, Importance] = {
        name: get_method(name)(context).importance_arrays(0) for name in ("sensitivity", "mdp")
    }

    def solve(importance: Importance, share: float) -> tuple[Structure, float]:
        found = allocator.solve(importance, share * allocator.dense_ms)
        if found is None:
            raise SystemExit(f"better_structures: no structure reaches {args.latency}")
        return found.structure, allocator.dense_ms / found.predicted_ms

    def noisy() -> Importance:
        base = named["sensitivity" if rng.random() < 0.5 else "mdp"]
        return {name: values * np.exp(SPREAD * rng.standard_normal()) for name, values in base.items()}

    def draw(open_share: float) -> Structure:
        return solve(noisy(), ratio + (1 - ratio) * open_share)[0]

    candidates = {"pass" if name == "sensitivity" else name: solve(values, MARGIN * ratio)
                  for name, values in named.items()}  # fmt: skip
    l1 = context.allocator("global").solve(get_method("l1")(context).importance_arrays(0), MARGIN * ratio
                                           * allocator.dense_ms)  # fmt: skip
    if l1 is not None:
        candidates["l1"] = l1.structure, allocator.dense_ms / l1.predicted_ms
    for name, values in named.items():
        for factor in BLOCKS:
            scaled = {group: v * (factor if group.startswith("depth:") else 1.0) for group, v in values.items()}
            candidates[f"{name}, blocks x {factor:g}"] = solve(scaled, MARGIN * ratio)
    for number in range(args.candidates):
        candidates[f"random {number}"] = solve(noisy(), MARGIN * ratio)
    different = {structure.digest(): (name, structure, speed) for name, (structure, speed) in
                 reversed(candidates.items())}  # fmt: skip
    judge = Judge(context, args.images)
    before = {digest: judge.divergence(structure) for digest, (_, structure, _) in different.items()}
    judge.train(draw, args.steps, args.seed)
    rows = []
    for digest, (name, structure, speed) in different.items():
        widths = context.groups.canonical(structure).widths()
        after = judge.divergence(structure)
        rows.append({"candidate": name, "predicted_speedup": round(speed, 3), "before": round(before[digest], 4),
                     "after": round(after, 4), "widths": widths})  # fmt: skip
    rows.sort(key=lambda row: row["after"])
    path = device_folder(args.target) / f"better-structures-{args.data}-{args.latency}.json"
    write_json(path, {"arguments": dict(vars(args)), "device": run.target.device, "rows": rows})
    for row in rows[:12]:
        losses = f"before {row['before']:.3f}  after {row['after']:.3f}"
        print(f"{row['candidate']:30s} {row['predicted_speedup']:.2f}x  {losses}")
    place = next(i for i, row in enumerate(rows, 1) if row["candidate"] == "pass")
    print(f"pass's own structure is number {place} of {len(rows)}")


if __name__ == "__main__":
    main()
