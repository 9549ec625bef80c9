"""Torch-Pruning's defaults beside passdeploy, at the same measured latency: accuracy and realisation.

    python benchmarks/train_dense.py --model resnet18 --size 64 --data cifar10 --epochs 3 --out benchmarks/results/dense
    python benchmarks/realisation.py --model resnet18 --size 64 --data cifar10 --latency 2x,3x

Realisation is the measured speed-up over the speed-up in multiply-accumulates: how much of what was removed was felt.
Torch-Pruning (https://github.com/VainF/Torch-Pruning) prunes as its documentation does (group magnitude, the same ratio
everywhere, no rounding); its ratio is bisected until the compiled engine, timed beside the dense one, is inside the
budget. Both are fine-tuned for the same steps in all, with the same distillation. One row per tool and budget is
appended to `benchmarks/results/<device>/realisation.jsonl`; what is there is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
os.environ.setdefault("KMP_BLOCKTIME", "0")

from common import device_folder
from external import close, tuned
from train_dense import weights_path

from passdeploy.config import RunConfig, make_config
from passdeploy.console import Ui
from passdeploy.engines.base import CompileInput, get_backend
from passdeploy.export import export_onnx
from passdeploy.groups import Groups, operators
from passdeploy.groups.operators import macs
from passdeploy.opening import free_folder
from passdeploy.pipeline import Run
from passdeploy.siblings import link_siblings
from passdeploy.stages.common import plain
from passdeploy.training import evaluate
from passdeploy.workspace import read_json

RIVAL = "tp-default"
SEARCH_EPOCHS = 0.5
"""Also those of rows that do not name them."""
FOLDER = Path(__file__).parent / "results" / "dense"


def ours(run: Run, have: set[str]) -> Iterator[dict[str, Any]]:
    """The whole of `passdeploy run`, a row per budget."""
    left = [budget for budget in run.runs if budget.budget.asked not in have]
    if left:
        run.shared()
    for budget in left:
        report = run.finish(budget)
        validation = None
        if report.pruned is not None:
            validation = read_json(budget.space.folder("finetune") / "finetune.json")["accuracy"]["validation"]
        yield {
            "tool": "passdeploy",
            "asked": budget.budget.asked,
            "status": report.status,
            "accuracy": report.pruned.accuracy if report.pruned else None,
            "accuracy_validation": validation,
            "dense_accuracy": report.dense.accuracy,
            "speedup": report.speedup.latency,
            "macs_speedup": report.speedup.macs,
            "realisation": report.speedup.realisation,
        }
    if left:
        link_siblings(run.runs)


def theirs(run: Run, have: set[str]) -> Iterator[dict[str, Any]]:
    """Torch-Pruning at the same budgets."""
    left = [budget for budget in run.runs if budget.budget.asked not in have]
    if not left:
        return
    run.shared("dense")  # where our rows are there, their run need not be
    backend, data = get_backend(run.target.backend), run.subject.data
    network = plain(run, run.subject.with_state(run.dense_state()))
    with tempfile.TemporaryDirectory(prefix="passdeploy-") as scratch:
        path = export_onnx(network, Path(scratch) / "d.onnx", data.input_shape, run.target.batch)
        dense = backend.compile(CompileInput(onnx=path, samples=run.calibration_images), run.target)
    dense_accuracy = read_json(run.space.folder("dense") / "dense.json")["accuracy"]["test"]
    for budget in left:
        small, comparison = close(run, RIVAL, budget.budget, dense, 1)
        row: dict[str, Any] = {
            "tool": f"Torch-Pruning {metadata.version('torch-pruning')}",
            "asked": budget.budget.asked,
        }
        if small is None or comparison is None:
            yield row | {"status": "infeasible", "dense_accuracy": dense_accuracy}
            continue
        fewer = float(macs(run.subject.operators)) / float(macs(operators(small, run.subject.example[:1], Groups(()))))
        model, _ = tuned(run, small)
        faster = comparison.ratio("thin").value
        yield row | {
            "status": "within_budget",
            "accuracy": evaluate(model, data.test),
            "accuracy_validation": evaluate(model, data.val),
            "dense_accuracy": dense_accuracy,
            "speedup": faster,
            "macs_speedup": fewer,
            "realisation": faster / fewer,
        }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| network | asked | tool | measured | MACs | realisation | accuracy (dense) |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        where = f"{row['model']} at {row['size']}, {row['data']}"
        if row.get("speedup") is None:
            lines.append(f"| {where} | {row['asked']} | {row['tool']} | {row['status']} | | | |")
            continue
        lines.append(
            f"| {where} | {row['asked']} | {row['tool']} | {row['speedup']:.2f}x | {row['macs_speedup']:.2f}x "
            f"| {row['realisation']:.2f} | {100 * row['accuracy']:.2f} % ({100 * row['dense_accuracy']:.2f} %) |"
        )
    return "\n".join(lines)


def configuration(args: argparse.Namespace) -> RunConfig:
    return make_config(
        {
            "model": args.model,
            "data": args.data,
            "input_size": [args.size, args.size],
            "weights": os.path.relpath(weights_path(FOLDER, args.model, args.data, args.size)),
            "latency": args.latency,
            "epochs": args.epochs,
            "search": {"epochs": args.search_epochs},
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--latency", default="2x,3x")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--search-epochs", type=float, default=SEARCH_EPOCHS)
    parser.add_argument("--runs", type=Path, default=Path("runs/realisation"))
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    path = device_folder("cpu") / "realisation.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    about = {"model": args.model, "size": args.size, "data": args.data, "epochs": args.epochs}
    about["search_epochs"] = args.search_epochs
    mine = [row for row in rows if all({"search_epochs": SEARCH_EPOCHS, **row}[key] == about[key] for key in about)]
    if not args.table:
        path.parent.mkdir(parents=True, exist_ok=True)
        config = configuration(args)
        run = Run(config, free_folder(config, args.runs / f"{args.model}-{args.size}-{args.data}"), Ui())
        made = (
            ours(run, {row["asked"] for row in mine if row["tool"] == "passdeploy"}),
            theirs(run, {row["asked"] for row in mine if row["tool"] != "passdeploy"}),
        )
        for row in chain.from_iterable(made):
            stamp = {"device": run.target.device, "measured": time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime())}
            with path.open("a") as file:
                file.write(json.dumps({**about, **row, **stamp}) + "\n")
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    print(table(rows))


if __name__ == "__main__":
    main()
