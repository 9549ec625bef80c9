"""The final copies of what the stages made, where users look for them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from passdeploy.dependencies import BUDGET_STAGES, skipped
from passdeploy.publishing import offer_folder, withdraw_folder
from passdeploy.workspace import copy_file

if TYPE_CHECKING:
    from passdeploy.pipeline import BudgetRun, Run


FILES = {
    "structure.json": "fit",
    "model.safetensors": "finetune",
    "architecture.json": "finetune",
    "model.onnx": "compile",
    "measurements.csv": "bench",
    "prompt.safetensors": "finetune",
    "report.json": "report",
    "report.md": "report",
    "report.html": "report",
}
"""Files that are offered, and the stages that make them."""
FOLDERS = {"engine": "compile", "bundle": "ship"}
"""Likewise of folders."""


def copy_final(run: Run, budget: BudgetRun, root: Path, until: str | None) -> None:
    """Puts the final copies where the design promises them: into `root`.

    Args:
        run: The run.
        budget: One of its budgets, whose stages up to `until` have just been run; None: those that budgets share have.
        root: Where to.
        until: What later stages left is offered if it is still what they would make.
    """
    folder = budget.space.folder
    for space in {run.space.root: run.space, budget.space.root: budget.space}.values():
        space.update_manifest()
    made = _made(run, budget, until)
    # Where the proof failed that engine is nobody's, while the dense network's graph is what it was.
    good = made - {"compile"} if "bench" in skipped(budget) else made
    for name, stage in FILES.items():
        source = folder(stage) / name
        if stage in good and source.exists():
            copy_file(source, root / name)
        else:
            (root / name).unlink(missing_ok=True)  # of an earlier state: what is not good any more is not offered
    dense, offered = folder("compile") / "dense.onnx", run.space.root / "dense.onnx"
    if "compile" in made and dense.exists():
        copy_file(dense, offered)
    elif offered.exists() and not any(_compiled(run, other) for other in run.runs):  # of weights that may be gone
        offered.unlink()
    for name, stage in FOLDERS.items():
        source = folder(stage) / name
        kept = stage in good and source.exists()
        if said := offer_folder(source, root / name) if kept else withdraw_folder(root / name):
            run.ui.say(said)
    if (root / "masked").is_dir():
        from passdeploy.masked import attach

        attach(root)


def _compiled(run: Run, budget: BudgetRun) -> bool:
    """Whether what a budget compiled is still what it would compile."""
    return budget.space.record("compile") is not None and "compile" in _made(run, budget, None)


def _made(run: Run, budget: BudgetRun, until: str | None) -> set[str]:
    """Stages of a budget, finished up to `until`, whose results are true: later ones only if nothing changed."""
    left_out = skipped(budget)
    last = -1 if until is None else BUDGET_STAGES.index(until)
    made = {name for name in BUDGET_STAGES[: last + 1] if name not in left_out}
    for name in BUDGET_STAGES[last + 1 :]:
        if name in left_out:
            continue
        if not budget.space.current(name, run.inputs(name, budget)):
            break
        made.add(name)
    return made
