"""The comparison of the README: every method screened, then the best three and pass with several seeds.

    python benchmarks/compare_cifar.py screen                     every method, 2x, one seed, judged on validation
    python benchmarks/compare_cifar.py final                      pass, its start and the best three, 2x and 3x
    python benchmarks/compare_cifar.py page [--results FOLDER ...]   docs/studies/comparison-DATA.md from the rows
    python benchmarks/compare_cifar.py screen --data fashion-mnist

Every budget has a search of its own, so that all methods take the same number of training steps at each. Rows are
appended to benchmarks/results/DEVICE/compare-DATA.json as they come; what is there is not run again, so a long
comparison goes on where it stopped. The dense network's weights are those that ship with the package, else those that
`python benchmarks/train_dense.py --data DATA --epochs 12 --out benchmarks/results/dense` wrote.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("KMP_BLOCKTIME", "0")
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

from common import RESULTS, device_folder
from rich.console import Console
from train_dense import weights_path

from passdeploy.budget import parse_budgets
from passdeploy.compare.command import compare
from passdeploy.compare.plot import tradeoff
from passdeploy.compare.rows import Row, RowFile
from passdeploy.compare.runner import Arm, Plan
from passdeploy.compare.statistics import cells
from passdeploy.compare.table import markdown, render
from passdeploy.config import RunConfig, make_config
from passdeploy.console import Ui
from passdeploy.search.method import methods
from passdeploy.study.base import differences, standalone
from passdeploy.weights import PACKAGED
from passdeploy.workspace import write_atomic

PAGES = Path(__file__).parents[1] / "docs" / "studies"
BEST = 3
SCREENED_AT = "2x"
EPOCHS, SEARCH_EPOCHS = 1.0, 0.43
START = "sensitivity"
"""What pass's search starts from, without the search: the control of the finals."""
PASS = Arm("pass", "pass")
OURS = ("pass", "pass-no-prompt", "pass-no-recurrence", "pass-no-statistics", START)
"""PASS and parts of it: shown, but no rivals."""


def configuration(args: argparse.Namespace, latency: str) -> RunConfig:
    shipped = weights_path(PACKAGED, args.model, args.data).is_file()
    weights = weights_path(RESULTS / "dense", args.model, args.data)
    return make_config(
        {
            "model": args.model,
            "data": args.data,
            "weights": None if shipped else os.path.relpath(weights),
            "target": args.target,
            "latency": latency,
            "epochs": args.epochs,
            "search": {"epochs": args.search_epochs},
        }
    )


def rows_at(path: Path, config: RunConfig) -> list[Row]:
    """Rows that were run with the settings of `config`."""
    settings = Plan(config, (), (0,), Path(), RowFile(path)).settings()
    return [row for row in RowFile(path).read() if row.settings == settings]


def run_last(rows: list[Row], budget: str) -> list[Row]:
    """Those of a budget that share what `pass` was last run with, whatever the defaults have become since."""
    at = [row for row in rows if row.budget == budget]
    last = [(row.settings, row.inputs) for row in at if row.method == "pass"][-1:]
    return [row for group in _alike(at) for row in group if (row.settings, row.inputs) in last]


def screened(rows: list[Row]) -> list[Row]:
    """The first seed's rows of the newest screening: where most methods were run, since finals run only a few again."""
    groups = _alike([row for row in rows if row.budget == SCREENED_AT and row.seed == 0])
    return max(reversed(groups), key=lambda group: len({row.method for row in group}), default=[])


def _alike(rows: list[Row]) -> list[list[Row]]:
    """Rows that share settings and inputs, and of each method those like its last one; what was run last comes last."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups[row.settings, row.inputs] = [*groups.pop((row.settings, row.inputs), []), row]
    own = [{row.method: row.own for row in group} for group in groups.values()]
    return [
        [row for row in group if row.own == last[row.method]] for group, last in zip(groups.values(), own, strict=True)
    ]


def best_of(screening: list[Row]) -> list[str]:
    """The rivals that were best on validation, of those that `final` can run."""
    ranked = [cell.method for cell in cells(screening, "validation", "pass") if cell.accuracy is not None]
    return [name for name in ranked if name in methods() and name not in OURS][:BEST]


def page(args: argparse.Namespace, paths: list[Path], budgets: list[str]) -> str:
    """The page of a comparison: the finals' tables on test, a machine each, the first one's screening on validation."""
    screening = screened(RowFile(paths[0]).read())
    if not screening:
        raise SystemExit(f"compare_cifar: {paths[0]} has no rows at {SCREENED_AT}; run `screen` first")
    finalists = ["pass", *best_of(screening)]
    finals = [repeated([row for budget in budgets for row in run_last(RowFile(path).read(), budget)]) for path in paths]
    for path, final in zip(paths, finals, strict=True):
        if not final:
            raise SystemExit(f"compare_cifar: {path} has no rows of pass at {','.join(budgets)}; run `final` first")
    today = {Plan(configuration(args, b), (), (0,), Path(), RowFile(paths[0])).own(PASS) for b in budgets}
    settings = f"--data {args.data} --epochs {args.epochs:g} --search-epochs {args.search_epochs:g}"
    parts = [
        f"# {screening[0].model} on {screening[0].data}: pass and the others at the same measured latency",
        "\n\n".join(
            f"{final[0].device}:\n\n"
            + "\n".join(f"- {sentence}" for sentence in [*earlier(final, today), *differences(final, "pass")])
            for final in finals
        ),
        f"Run with `python benchmarks/compare_cifar.py screen {settings}` and then `final`; rows, seed by seed: "
        f"{', '.join(f'`benchmarks/results/{path.parent.name}/{path.name}`' for path in paths)}. "
        f"`{START}` is what pass's search starts from, "
        "without the search; [what was tried](tried.md) to make the search worth more.",
    ]
    figure = tradeoff(finals[0], "test", "pass")
    if figure is not None:
        write_atomic(PAGES / f"comparison-{args.data}.svg", standalone(figure))
        parts.append(f"![accuracy over measured speed-up](comparison-{args.data}.svg)")
    for final in finals:
        parts += [
            f"## {heading(final, finalists)}, test split, {final[0].device}",
            markdown(final, "test", "pass").rstrip(),
        ]
    parts += [f"## Screening: {methods_of(screening)}, {SCREENED_AT}, validation split, one seed"]
    parts += [markdown(screening, "validation", "pass").rstrip()]
    return "\n\n".join(parts) + "\n"


def earlier(rows: list[Row], today: set[str]) -> list[str]:
    """A sentence where `pass` was run with other settings of its search than it has by now."""
    old = [budget for budget in dict.fromkeys(row.budget for row in rows) for row in rows
           if (row.method, row.budget) == ("pass", budget) and row.own not in today]  # fmt: skip
    at = " and ".join(dict.fromkeys(old))
    return [f"`pass` at {at} is an earlier one, with other settings of the search."] if old else []


def methods_of(screening: list[Row]) -> str:
    """Which methods were screened."""
    left = [name for name in methods() if name not in {row.method for row in screening}]
    return "every method" + (f" but {', '.join(left)}" if left else "")


def repeated(rows: list[Row]) -> list[Row]:
    """Of finals those of methods that were run with several seeds; all, where none was."""
    seeds: dict[str, set[int]] = {}
    for row in rows:
        seeds.setdefault(row.method, set()).add(row.seed)
    return [row for row in rows if len(seeds[row.method]) > 1] or rows


def heading(rows: list[Row], finalists: list[str]) -> str:
    """What was run, of the finals."""
    names = dict.fromkeys(row.method for row in rows)
    there = [name for name in (*finalists, *names) if name in names]
    if there[: len(finalists)] == finalists:
        return "The best three and pass"
    return ", ".join(dict.fromkeys(there))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("screen", "final", "page"))
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--target", default="cpu")
    parser.add_argument(
        "--methods", default=None, help="default: all, or pass, its start and the best three of the screening"
    )
    parser.add_argument("--epochs", type=float, default=EPOCHS)
    parser.add_argument("--search-epochs", type=float, default=SEARCH_EPOCHS)
    parser.add_argument("--latency", default="2x,3x", help="budgets of `final`")
    parser.add_argument("--seeds", default="0,1,2", help="seeds of `final`")
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parser.add_argument("--results", type=Path, nargs="+", help="folders of `page`; default: this machine's")
    args = parser.parse_args()
    path = device_folder(args.target) / f"compare-{args.data}.json"
    console, ui = Console(highlight=False), Ui()
    budgets = [budget.asked for budget in parse_budgets(args.latency)]  # as rows have them

    if args.what == "screen":
        config, names = configuration(args, SCREENED_AT), args.methods or ",".join(methods())
        found = compare(
            config, names, "0", args.out / f"{args.data}-{SCREENED_AT}", split="validation", rows=path, ui=ui
        )
        console.print(render(found.rows, "validation"))
    elif args.what == "final":
        best = best_of(screened(rows_at(path, configuration(args, SCREENED_AT))))
        if not args.methods and len(best) < BEST:
            raise SystemExit("compare_cifar: run `screen` with the same settings first, or name --methods")
        names = args.methods or ",".join(["pass", START, *best])
        for budget in budgets:
            out = args.out / f"{args.data}-{budget}"
            found = compare(configuration(args, budget), names, args.seeds, out, rows=path, ui=ui)
            console.print(render(found.rows, "test"))
    else:
        PAGES.mkdir(parents=True, exist_ok=True)
        written = PAGES / f"comparison-{args.data}.md"
        paths = [folder / path.name for folder in args.results] if args.results else [path]
        write_atomic(written, page(args, paths, budgets))
        console.print(f"{written}")


if __name__ == "__main__":
    main()
