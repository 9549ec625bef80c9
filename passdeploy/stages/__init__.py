"""What each stage computes: one module per stage.

Every stage is a function that writes into the folder it is given and reads finished stages only; `passdeploy.pipeline`
says when one runs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from passdeploy.stages.alternatives import run_alternatives
from passdeploy.stages.bench import run_bench
from passdeploy.stages.compile import run_compile
from passdeploy.stages.dense import run_dense
from passdeploy.stages.finetune import run_finetune
from passdeploy.stages.fit import run_fit
from passdeploy.stages.profile import run_profile
from passdeploy.stages.report import run_report
from passdeploy.stages.search import run_search
from passdeploy.stages.ship import run_ship

if TYPE_CHECKING:
    from passdeploy.pipeline import BudgetRun, Run

SHARED: dict[str, Callable[[Run, Path], None]] = {
    "dense": run_dense,
    "profile": run_profile,
    "search": run_search,
    "alternatives": run_alternatives,
}
"""Stages that all budgets of a run share, in order."""
PER_BUDGET: dict[str, Callable[[Run, BudgetRun, Path], None]] = {
    "fit": run_fit,
    "finetune": run_finetune,
    "compile": run_compile,
    "bench": run_bench,
    "report": run_report,
    "ship": run_ship,
}
"""Stages of one budget, in order."""
