"""What the command line prints at the end of a run."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from passdeploy.summary import render
from tests.reporting.variants import variant


@pytest.mark.parametrize(("status", "shipped"), [("within_budget", True), ("infeasible", False)])
def test_only_files_that_are_there_are_named(tmp_path: Path, status: str, shipped: bool) -> None:
    (tmp_path / "report.html").touch()
    if shipped:
        (tmp_path / "bundle").mkdir()
    console = Console(width=500)
    with console.capture() as captured:
        console.print(render(variant(status), tmp_path))
    said = captured.get()
    assert str(tmp_path / "report.html") in said
    assert (str(tmp_path / "bundle") in said) == shipped
