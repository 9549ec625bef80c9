from __future__ import annotations

import re
from pathlib import Path

import pytest

from passdeploy.reporting.files import write_reports
from passdeploy.reporting.schema import Status
from tests.reporting.variants import STATUSES, runs, variant

PAGE = Path(__file__).parents[2] / "docs" / "report.md"


def test_the_pages_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_reports(variant("within_budget"), tmp_path / "runs" / "demo")
    for report in runs():
        write_reports(report, tmp_path / "runs" / f"{report.method}-{report.budget.asked}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 1
    exec(compile(blocks[0], str(PAGE), "exec"), {})
    written = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert written == {"junit.xml", "benchmark.json", "history.html", "comparison.html"}
    assert (tmp_path / "copy" / "report.html").read_text() == (tmp_path / "runs" / "demo" / "report.html").read_text()


def test_the_page_explains_every_status() -> None:
    assert set(re.findall(r"^\| `(\w+)`", PAGE.read_text(), re.MULTILINE)) == set(STATUSES)
    assert set(Status.__args__) == set(STATUSES)  # type: ignore[attr-defined]
