"""Sets the reports of budgets that one search served beside each other."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from passdeploy.reporting import load_report, write_reports
from passdeploy.reporting.schema import BudgetResult, Report

if TYPE_CHECKING:
    from passdeploy.pipeline import BudgetRun


def link_siblings(budgets: Sequence[BudgetRun], best: Path | None = None) -> None:
    """Writes the final copies of the reports again, each with a table of what all the budgets came to.

    Only the copies: a stage's own report depends on its budget alone, so that one budget can be run again without the
    others' bundles being sealed anew.

    Args:
        budgets: Of one run; those without a report are left out.
        best: Another folder that holds the copies of one of them.
    """
    folders = [budget.space.root for budget in budgets if (budget.space.root / "report.json").exists()]
    if len(folders) < 2:
        return
    reports = [(folder, load_report(folder / "report.json")) for folder in folders]
    if best is not None and (best / "report.json").exists():
        folders = [*folders, best]
    for root in folders:
        found = [_result(report, Path(os.path.relpath(folder, root))) for folder, report in reports]
        write_reports(load_report(root / "report.json").model_copy(update={"budgets": found}), root)


def _result(report: Report, folder: Path) -> BudgetResult:
    pruned = report.pruned
    latency = pruned.latency_ms if pruned is not None else None
    return BudgetResult(
        asked=report.budget.asked,
        status=report.status,
        accuracy=pruned.accuracy if pruned is not None else None,
        latency_ms=getattr(latency, report.budget.percentile) if latency is not None else None,
        speedup=report.speedup.latency,
        path=(folder / "report.html").as_posix(),
    )
