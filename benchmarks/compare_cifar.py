"""The comparison of the README: every method screened, then the best three and pass with several seeds.

    python benchmarks/compare_cifar.py screen                     every method, 2x, one seed, judged on validation
    python benchmarks/compare_cifar.py final                      the best three of the screening and pass, 2x and 3x
    python benchmarks/compare_cifar.py table                      prints the tables from the rows that are there
    python benchmarks/compare_cifar.py screen --data fashion-mnist --epochs 1 --search-epochs 0.5

Rows are appended to benchmarks/results/DEVICE/compare-DATA.json as they come; what is there is not run again, so a
long comparison goes on where it stopped. The dense network's weights are those that ship with the package, else
those that `python benchmarks/train_dense.py --data DATA --out benchmarks/results/dense` wrote.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("KMP_BLOCKTIME", "0")

from common import RESULTS, device_folder
from rich.console import Console

from passdeploy.compare.command import compare
from passdeploy.compare.rows import Row, RowFile
from passdeploy.compare.runner import Plan, arms_of
from passdeploy.compare.statistics import cells
from passdeploy.compare.table import render
from passdeploy.config import RunConfig, make_config
from passdeploy.console import Ui
from passdeploy.search.method import methods
from passdeploy.weights import packaged_weights

BEST = 3
NOT_RIVALS = ("pass", "pass-no-prompt", "pass-no-recurrence", "pass-no-statistics")


def configuration(args: argparse.Namespace, latency: str) -> RunConfig:
    weights = RESULTS / "dense" / f"{args.model}-{args.data}.safetensors"
    own = packaged_weights(args.model, args.data) is None
    return make_config(
        {
            "model": args.model,
            "data": args.data,
            "weights": os.path.relpath(weights) if own else None,
            "target": args.target,
            "latency": latency,
            "epochs": args.epochs,
            "search": {"epochs": args.search_epochs},
        }
    )


def best_of(rows: list[Row]) -> list[str]:
    """The rivals that were best on validation at the screening's budget."""
    ranked = [cell.method for cell in cells(rows, "validation", "pass") if cell.accuracy is not None]
    return [name for name in ranked if name not in NOT_RIVALS][:BEST]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("screen", "final", "table"))
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--methods", default=None, help="default: all, or the best three of the screening and pass")
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--search-epochs", type=float, default=1.0)
    parser.add_argument("--latency", default="2x,3x", help="budgets of `final`")
    parser.add_argument("--seeds", default="0,1,2", help="seeds of `final`")
    parser.add_argument("--out", type=Path, default=Path("runs"))
    args = parser.parse_args()
    path = device_folder(args.target) / f"compare-{args.data}.json"
    console, ui = Console(highlight=False), Ui()
    screening, final = configuration(args, "2x"), configuration(args, args.latency)

    if args.what == "screen":
        names = args.methods or ",".join(methods())
        found = compare(screening, names, "0", args.out / f"screen-{args.data}", split="validation", rows=path, ui=ui)
        console.print(render(found.rows, "validation"))
    elif args.what == "final":
        settings = Plan(screening, arms_of(["pass"]), (0,), args.out, RowFile(path)).settings()
        best = best_of([row for row in RowFile(path).read() if row.settings == settings])
        if not args.methods and not best:
            raise SystemExit("compare_cifar: run `screen` with the same settings first, or name --methods")
        names = args.methods or ",".join(["pass", *best])
        found = compare(final, names, args.seeds, args.out / f"final-{args.data}", rows=path, ui=ui)
        console.print(render(found.rows, "test"))
    else:
        rows = RowFile(path).read()
        for settings in dict.fromkeys(row.settings for row in rows):
            some = [row for row in rows if row.settings == settings]
            # A single seed is a screening: shown on what it was chosen by.
            split = "validation" if len({row.seed for row in some}) == 1 else "test"
            console.print(f"\nsettings {settings}")
            console.print(render(some, split))
        if not rows:
            console.print(f"{path}: no rows yet")


if __name__ == "__main__":
    main()
