from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from passdeploy.errors import BadInput, PassdeployError
from passdeploy.reporting.files import dumps, find_reports, load_report, parse_report, write_reports
from tests.reporting.variants import FILE, STATUSES, data, variant


@pytest.mark.parametrize("status", STATUSES)
def test_json_alone_gives_back_the_same_pages(status: str, tmp_path: Path) -> None:
    paths = write_reports(variant(status), tmp_path / "first")
    again = write_reports(load_report(paths["json"]), tmp_path / "second")
    for suffix in ("json", "md", "html"):
        assert paths[suffix].read_bytes() == again[suffix].read_bytes()
    assert sorted(p.name for p in (tmp_path / "first").iterdir()) == ["report.html", "report.json", "report.md"]


def test_a_run_folder_can_be_given(tmp_path: Path) -> None:
    write_reports(variant("within_budget"), tmp_path)
    assert load_report(tmp_path) == variant("within_budget")


def test_a_folder_of_runs_stands_for_all_of_them_and_no_copies(tmp_path: Path) -> None:
    """As a run with several budgets leaves it: final copies, stages and bundles below them, and an unfinished stage."""
    wanted = []
    for name in ("runs/a", "runs/b/2x", "runs/b/3x"):
        for copy in ("", "report", "bundle/parts", ".partial/report"):
            write_reports(variant("within_budget"), tmp_path / name / copy)
        wanted.append(tmp_path / name / "report.json")
    served = tmp_path / "runs/models/net/1/bundle"
    write_reports(variant("within_budget"), served / "parts")
    (served / "SHA256SUMS").touch()
    assert find_reports(tmp_path / "runs") == wanted
    assert find_reports(tmp_path / "runs/models") == find_reports(served) == [served / "parts/report.json"]
    assert find_reports(tmp_path / "runs" / "b" / "2x") == wanted[1:2]
    assert find_reports(wanted[0]) == wanted[:1]
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match=r"no report\.json in it"):
        find_reports(tmp_path / "empty")
    with pytest.raises(BadInput, match="no such run folder"):
        find_reports(tmp_path / "nowhere")


def test_a_report_that_a_run_has_withdrawn_is_not_found(tmp_path: Path) -> None:
    """It still lies in the stage's folder."""
    write_reports(variant("within_budget"), tmp_path / "run" / "report")
    (tmp_path / "run" / "report" / "stage.json").write_text("{}")
    with pytest.raises(BadInput, match=r"no report\.json in it or below"):
        find_reports(tmp_path / "run")
    assert find_reports(tmp_path / "run" / "report") == [tmp_path / "run" / "report" / "report.json"]


def test_keys_of_later_versions_are_ignored(tmp_path: Path) -> None:
    d = data()
    d["later"] = 1
    d["dense"]["latency_ms"]["p999"] = 3.0
    d["groups"][0]["later"] = []
    (tmp_path / "report.json").write_text(json.dumps(d))
    assert load_report(tmp_path) == variant("within_budget")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "found 'list'"),
        ('{"schema": "passdeploy.report/2"}', "found 'passdeploy.report/2'"),
        ('{"schema": "passdeploy.report/1"}', "Field required and 11 more"),
        (FILE.read_text().replace('"within_budget"', '"fine"', 1), "status: Input should be"),
        (FILE.read_text().replace('"kept": 16', '"kept": 17', 1), "keeps 17 of 16"),
        ("\udcff", "cannot be read"),
    ],
)
def test_what_is_no_report_is_refused_in_one_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(BadInput) as caught:
        load_report(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_report_says_where_reports_come_from(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such report; passdeploy run"):
        load_report(tmp_path)


def test_nothing_is_lost_when_the_folder_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(PassdeployError, match="cannot be written") as caught:
        write_reports(variant("within_budget"), tmp_path / "file")
    assert "\n" not in str(caught.value)
    assert (tmp_path / "file").read_text() == "kept"


def test_json_is_valid_readable_and_never_holds_nan() -> None:
    nested = {"a": [1, 2.5, None], "b": [{"c": "ü\n"}, {}], "d": {}, "e": [[1], []]}
    assert json.loads(dumps(nested)) == nested
    assert '"a": [1, 2.5, null]' in dumps(nested)
    with pytest.raises(ValueError, match="Out of range"):
        dumps({"a": [math.nan]})


def test_parse_names_the_place() -> None:
    d = data()
    d["health"][2]["ok"] = "maybe"
    with pytest.raises(BadInput, match=r"health\.2\.ok"):
        parse_report(d)


def test_importing_the_package_is_light() -> None:
    code = (
        "import sys, passdeploy.reporting, passdeploy.reporting.exporters, passdeploy.reporting.history;"
        "heavy = {'torch', 'pandas', 'matplotlib'} & set(sys.modules); sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
