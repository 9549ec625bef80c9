"""report.json, report.md and report.html of one budget."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from passdeploy.reporting import write_reports

if TYPE_CHECKING:
    from passdeploy.pipeline import BudgetRun, Run


def run_report(run: Run, budget: BudgetRun, folder: Path) -> None:
    """Writes report.json, report.md and report.html."""
    from passdeploy.assemble import assemble

    write_reports(assemble(run, budget), folder)
