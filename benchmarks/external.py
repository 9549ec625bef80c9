"""External rivals through their own packages, at the same measured latency and with the same training steps.

    python benchmarks/external.py --data fashion-mnist --latency 2x --seeds 0
    python benchmarks/external.py --rivals tp-magnitude,tp-group-norm,tp-bn-scale

Torch-Pruning (https://github.com/VainF/Torch-Pruning) chooses and removes channels by itself, globally, rounded to the
step of the target; its pruning ratio is bisected until the compiled engine, measured beside the dense one in fresh
processes as ours is, is inside the budget. Fine-tuning, distillation, batch-norm re-estimation and evaluation are ours,
with the steps of search and fine-tuning together. Rows go to benchmarks/results/DEVICE/compare-DATA.json, beside those
of compare_cifar.py.

`modelopt-fastnas` is FastNAS of NVIDIA's Model Optimizer (`pip install nvidia-modelopt huggingface_hub
"torchprofile<0.1"`): it scores every width of every layer, in steps of eight channels, by the accuracy on validation
images, and prunes to a share of the multiply-adds, which is bisected likewise.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("KMP_BLOCKTIME", "0")

import torch
import torch_pruning as tp
from common import device_folder
from compare_cifar import EPOCHS, SEARCH_EPOCHS, configuration
from torch import nn

from passdeploy.budget import OVERSHOOT, Budget, parse_budgets
from passdeploy.compare.command import parse_seeds
from passdeploy.compare.rows import SPLITS, Row, RowFile
from passdeploy.compare.runner import Plan, share
from passdeploy.console import Ui
from passdeploy.data.base import SubSplit, evenly
from passdeploy.engines.base import CompileInput, Engine, get_backend
from passdeploy.export import export_onnx
from passdeploy.feeding import steps_per_epoch, training_batches
from passdeploy.groups import operators
from passdeploy.groups.operators import macs
from passdeploy.groups.types import Groups
from passdeploy.judging import judge
from passdeploy.latency.measure import BENCH
from passdeploy.latency.measurement import Comparison
from passdeploy.opening import free_folder
from passdeploy.pipeline import Run
from passdeploy.search.prompt import Prompted
from passdeploy.stages.bench import in_processes
from passdeploy.stages.common import plain
from passdeploy.stages.finetune import finetune_settings
from passdeploy.stages.profile import stage_model
from passdeploy.timing import compare_engines
from passdeploy.training import evaluate, reestimate_batch_norm, train

SCORED_IMAGES = 1000
"""Validation images by which FastNAS scores a width."""
CALIBRATING_BATCHES = 8
"""Training batches on which it re-estimates batch norms for that."""
FASTNAS_STEP = 8
"""Channels; with the 16 that some CPUs like, hardly any width of ResNet-20 is left to choose."""
TURNS = 10


@dataclass(frozen=True)
class TorchPruning:
    """Removes a share of the channels.

    Attributes:
        importance: Of channels.
        as_documented: The same ratio in every group and no rounding, as Torch-Pruning's documentation begins; else
            global, rounded to the step of the target.
    """

    package: ClassVar[str] = "torch-pruning"
    importance: Callable[[], Any]
    as_documented: bool = False

    def prune(self, run: Run, network: nn.Module, ratio: float, step: int) -> nn.Module | None:
        """The network without a share `ratio` of its channels."""
        classes = run.subject.data.num_classes
        outputs = [m for m in network.modules() if isinstance(m, nn.Linear) and m.out_features == classes]
        torch.manual_seed(run.config.seed)
        tp.pruner.MetaPruner(
            network,
            run.subject.example[:1],
            importance=self.importance(),
            global_pruning=not self.as_documented,
            pruning_ratio=ratio,
            max_pruning_ratio=1 - run.config.search.keep_at_least,
            ignored_layers=outputs[-1:],
            round_to=None if self.as_documented else step,
        ).step()
        return network.eval()


class FastNas:
    """Removes a share of the multiply-adds, by the accuracy on validation images."""

    package: ClassVar[str] = "nvidia-modelopt"

    def prune(self, run: Run, network: nn.Module, ratio: float, step: int) -> nn.Module | None:
        """The network without a share `ratio` of its multiply-adds; None where there is no such network.

        Its scores are kept in the run.
        """
        import modelopt.torch.prune as mtp

        data, config = run.subject.data, mtp.fastnas.FastNASConfig()
        config["nn.Conv2d"]["*"]["channel_divisor"] = FASTNAS_STEP
        config["nn.BatchNorm2d"]["*"]["feature_divisor"] = FASTNAS_STEP
        scored = SubSplit(data.val, evenly(data.val, min(SCORED_IMAGES, len(data.val))))
        normalised = plain(run, network).stage
        batches = training_batches(data, run.config.train_batch, run.config.seed, CALIBRATING_BATCHES)
        try:
            small, _ = mtp.prune(
                network,
                mode=[("fastnas", config)],
                constraints={"flops": f"{100 * (1 - ratio):.2f}%"},
                dummy_input=run.subject.example[:1],
                config={
                    "data_loader": [normalised(images) for _, images, _ in batches],
                    "collect_func": lambda images: (images,),
                    "score_func": lambda model: evaluate(plain(run, model), scored),
                    "checkpoint": str(run.space.root / "fastnas.pth"),
                    "verbose": False,
                },
            )
        except ValueError as error:
            if "constraints can be satisfied" not in str(error):
                raise
            return None
        return small.eval()


RIVALS: dict[str, TorchPruning | FastNas] = {
    "tp-magnitude": TorchPruning(lambda: tp.importance.GroupMagnitudeImportance(p=1)),
    "tp-group-norm": TorchPruning(lambda: tp.importance.GroupMagnitudeImportance(p=2)),
    "tp-bn-scale": TorchPruning(lambda: tp.importance.BNScaleImportance()),
    "tp-random": TorchPruning(lambda: tp.importance.RandomImportance()),
    "tp-default": TorchPruning(lambda: tp.importance.GroupMagnitudeImportance(p=2), as_documented=True),
    "modelopt-fastnas": FastNas(),
}


def pruned(run: Run, rival: str, ratio: float, step: int) -> nn.Module | None:
    """The dense network with a share `ratio` removed by the rival; None where it has no such network."""
    return RIVALS[rival].prune(run, run.subject.with_state(run.dense_state()), ratio, step)


def compiled(run: Run, network: nn.Module) -> Engine:
    """The network's engine."""
    backend, images = get_backend(run.target.backend), run.validation_images
    with tempfile.TemporaryDirectory(prefix="passdeploy-") as folder:
        path = export_onnx(plain(run, network), Path(folder) / "m.onnx", run.subject.data.input_shape, run.target.batch)
        return backend.compile(CompileInput(onnx=path, samples=images), run.target)


def timed(run: Run, engines: Mapping[str, Engine]) -> Comparison:
    """Beside each other in this process: what is chosen by."""
    return compare_engines(engines, run.target, run.validation_images[: run.target.batch], run.config.scope, BENCH)


def confirmed(run: Run, budget: Budget, engines: Mapping[str, Engine]) -> Comparison:
    """Again in fresh processes, as what `passdeploy run` ships is: what its time was chosen by flatters it."""
    with tempfile.TemporaryDirectory(prefix="passdeploy-") as scratch:
        folders = {name: Path(scratch) / name for name in engines}
        for name, engine in engines.items():
            get_backend(run.target.backend).save(engine, folders[name])
        return in_processes(run, budget, folders)


def close(run: Run, rival: str, budget: Budget, dense: Engine, step: int) -> tuple[nn.Module | None, Comparison | None]:
    """Bisects the pruning ratio; the slowest network that is inside the budget, judged as ours is."""
    assert budget.speedup is not None
    low, high, best, said = 0.0, 1.0, None, None
    for _ in range(TURNS):
        middle = (low + high) / 2
        network = pruned(run, rival, middle, step)
        if network is None:
            high = middle
            continue
        engines = {"dense": dense, "thin": compiled(run, network)}
        speed = timed(run, engines).ratio("thin").value
        run.ui.say(f"  {rival}: ratio {middle:.3f} is {speed:.3f}x")
        again = confirmed(run, budget, engines) if speed >= budget.speedup else None
        if again is None or judge(budget, {"ratio": again.ratio("thin").to_json()}) != "within_budget":
            low = middle
            continue
        high, best, said = middle, network, again
        if again.ratio("thin").value <= OVERSHOOT * budget.speedup:
            break
    return best, said


def tuned(run: Run, network: nn.Module) -> tuple[Prompted, int]:
    """Trained like every other method without a search."""
    config, data = run.config, run.subject.data
    model = plain(run, network)
    reestimate_batch_norm(model, data, seed=config.seed)
    epoch = steps_per_epoch(data.train, config.train_batch)
    extra = max(config.search.min_steps, round(config.search.epochs * epoch))
    settings = finetune_settings(config, extra)
    teacher = plain(run, run.subject.with_state(run.dense_state()))
    curve = train(model, data, settings, teacher=teacher, progress=run.ui.step)
    return model, curve.step[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rivals", default="tp-magnitude,tp-group-norm")
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--epochs", type=float, default=EPOCHS)
    parser.add_argument("--search-epochs", type=float, default=SEARCH_EPOCHS)
    parser.add_argument("--latency", default="2x")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--out", type=Path, default=Path("runs"))
    args = parser.parse_args()
    wanted = parse_budgets(args.latency)
    if any(budget.speedup is None for budget in wanted):
        raise SystemExit(f"external: --latency {args.latency}: rivals are held against speed-ups, such as 2x,3x")
    for budget in wanted:  # each beside the methods of `compare_cifar.py`, which have one budget a run
        compare(args, budget)


def compare(args: argparse.Namespace, budget: Budget) -> None:
    """Appends the rows of a budget."""
    rows = RowFile(device_folder(args.target) / f"compare-{args.data}.json")
    config = configuration(args, budget.asked)
    folder = args.out / f"screen-{args.data}"
    plan = Plan(config, (), (0,), folder, rows)
    made_alike = (plan.settings(), plan.inputs)
    precision = plan.target.precision
    if precision in ("int8", "fp8"):  # their accuracies are the networks', ours are the engines'
        raise SystemExit(f"external: rivals are not judged in {precision}; choose a target in fp32, fp16 or bf16")
    below_fp32 = {} if precision == "fp32" else {"precision": precision, "accuracy_of": "network"}
    for seed in parse_seeds(args.seeds):
        seeded = config.model_copy(update={"seed": seed})
        run = Run(seeded, free_folder(seeded, folder / "external" / str(seed)), Ui())
        share(run, folder / "shared")
        dense_facts = stage_model(run)
        backend = get_backend(run.target.backend)
        with tempfile.TemporaryDirectory(prefix="passdeploy-") as scratch:
            network = plain(run, run.subject.with_state(run.dense_state()))
            path = export_onnx(network, Path(scratch) / "d.onnx", run.subject.data.input_shape, run.target.batch)
            dense = backend.compile(CompileInput(onnx=path, samples=run.calibration_images), run.target)
        accuracy = {
            s: evaluate(network, getattr(run.subject.data, "val" if s == "validation" else "test")) for s in SPLITS
        }
        for rival in args.rivals.split(","):
            if any(
                (r.method, r.seed, r.budget, r.settings, r.inputs) == (rival, seed, budget.asked, *made_alike)
                for r in rows.read()
            ):
                continue
            start = time.monotonic()
            small, comparison = close(run, rival, budget, dense, dense_facts.step)
            fitted = time.monotonic() - start
            model, steps = tuned(run, small) if small is not None else (None, None)
            ratio = comparison.ratio("thin") if comparison is not None else None
            cost = macs(operators(small, run.subject.example[:1], Groups(()))) if small is not None else None
            rows.append(
                Row(
                    method=rival,
                    data=run.subject.data.name,
                    model=run.subject.name,
                    budget=budget.asked,
                    axis="latency",
                    seed=seed,
                    split=split,
                    status="within_budget" if small is not None else "infeasible",
                    accuracy=evaluate(model, getattr(run.subject.data, "val" if split == "validation" else "test"))
                    if model is not None
                    else None,
                    dense_accuracy=accuracy[split],
                    ratio=ratio.value if ratio else None,
                    ratio_ci95=(ratio.low, ratio.high) if ratio and ratio.low > 0 else None,
                    macs=cost,
                    dense_macs=float(macs(run.subject.operators)),
                    params=sum(p.numel() for p in small.parameters()) if small is not None else None,
                    seconds={"fit": round(fitted, 1), "finetune": round(time.monotonic() - start - fitted, 1)},
                    steps=steps,
                    settings=plan.settings(),
                    inputs=plan.inputs,
                    device=run.target.device,
                    extra={RIVALS[rival].package: metadata.version(RIVALS[rival].package)} | below_fp32,
                )
                for split in SPLITS
            )


if __name__ == "__main__":
    main()
