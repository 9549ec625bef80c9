"""`passdeploy compare`: from what was typed to the pages."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from passdeploy.budget import FASTEST
from passdeploy.compare.page import write_pages
from passdeploy.compare.parallel import chosen_gpus, run_on_gpus
from passdeploy.compare.rows import SPLITS, RowFile
from passdeploy.compare.runner import Outcome, Plan, arms_of, run_plan
from passdeploy.config import RunConfig
from passdeploy.console import Ui
from passdeploy.errors import BadInput, nearest

if TYPE_CHECKING:
    from passdeploy.data.base import ImageData
    from passdeploy.subject import Model

ROWS = "compare.jsonl"


def parse_seeds(text: str) -> tuple[int, ...]:
    """``0,1,2``. Raises `BadInput` for anything but different whole numbers from 0 on."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    seeds = tuple(int(part) for part in parts if part.isdecimal())
    if not parts or len(seeds) != len(parts) or len(set(seeds)) != len(seeds):
        raise BadInput(f"--seeds {text!r}: give different whole numbers, separated by commas (0,1,2)")
    return seeds


def parse_methods(text: str) -> tuple[str, ...]:
    """``pass,l1``, or ``all``."""
    from passdeploy.search.method import methods

    if text.strip() == "all":
        return tuple(methods())
    return tuple(part.strip() for part in text.split(",") if part.strip())


def check_split(split: str) -> str:
    """Raises `BadInput` when there is no such split."""
    if split not in SPLITS:
        raise BadInput(f"--split {split}: no such split{nearest(split, SPLITS)}")
    return split


def check_budgets(config: RunConfig, verb: str) -> None:
    """Raises `BadInput` for what `run` alone takes, and for times where nothing is timed."""
    if FASTEST in config.latency:
        raise BadInput(f"{verb}: takes budgets (--latency 2x,3x), not {FASTEST}")
    if config.axis == "macs" and not all(budget.strip().endswith("x") for budget in config.latency):
        raise BadInput(f"--axis macs with --latency {','.join(config.latency)}: give budgets as factors (2x,3x)")


def compare(
    config: RunConfig,
    methods: str,
    seeds: str,
    out: Path,
    *,
    split: str = "test",
    rows: Path | None = None,
    ui: Ui | None = None,
    gpus: str | None = None,
    model: Model | None = None,
    data: ImageData | None = None,
) -> Outcome:
    """Runs every method with every seed, and writes rows, tables and page into `out`.

    Args:
        config: What all methods share.
        methods: Separated by commas, or ``all``.
        seeds: Separated by commas.
        out: Folder of the comparison.
        split: Whose accuracy the tables show.
        rows: Where results are appended; None: ``compare.jsonl`` in `out`.
        ui: Shows progress.
        gpus: As many runs at a time as are named (``0,1``) or there are (``all``), a GPU each; None: one after the
            other.
        model: A factory or a network instead of the configuration's.
        data: A data set instead of the configuration's.

    Raises:
        BadInput: Something can't be used; one line says what.
    """
    check_split(split)
    check_budgets(config, "compare")
    arms = arms_of(parse_methods(methods))
    plan = Plan(config, arms, parse_seeds(seeds), out, RowFile(rows or out / ROWS), model, data, split)
    outcome = run_plan(plan, ui) if gpus is None else run_on_gpus(plan, chosen_gpus(gpus), ui)
    write_pages(outcome, split, out)
    return outcome
