# ruff: noqa: RUF001  (reports use real multiplication and minus signs)
from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from passdeploy.errors import BadInput
from passdeploy.reporting.exporters import FORMATS, SUMMARY_LIMIT, export, write_step_summary
from passdeploy.reporting.files import parse_report
from tests.reporting.variants import STATUSES, data, runs, variant


def test_github_action_benchmark_has_only_what_was_measured() -> None:
    entries = json.loads(export([variant("within_budget"), variant("unverified")], "github-action-benchmark"))
    assert all(set(entry) <= {"name", "unit", "value", "range", "extra"} for entry in entries)
    assert all(isinstance(entry["value"], float) for entry in entries)
    assert len({entry["name"] for entry in entries}) == len(entries)
    cpu = {entry["name"].split(" / ")[-1]: entry for entry in entries if "onnxruntime" in entry["name"]}
    assert set(cpu) == {"p50", "latency ratio", "error of top-1 accuracy"}
    assert cpu["latency ratio"]["value"] == pytest.approx(1 / 2.068, abs=1e-5)
    low, high = map(float, cpu["latency ratio"]["range"].split(" to "))
    assert low < cpu["latency ratio"]["value"] < high
    assert cpu["error of top-1 accuracy"]["value"] == pytest.approx(7.28)
    gpu = [entry["name"] for entry in entries if "tensorrt_rtx" in entry["name"]]
    assert len(gpu) == 1
    assert gpu[0].endswith("error of top-1 accuracy")


def test_github_action_benchmark_names_do_not_change_with_the_measurement() -> None:
    d = data()
    d["provenance"]["commit"], d["speedup"]["latency"] = "another", 2.2
    d["pruned"]["latency_ms"]["p50"] = 0.27
    first, second = (
        json.loads(export([r], "github-action-benchmark")) for r in (variant("within_budget"), parse_report(d))
    )
    assert [entry["name"] for entry in first] == [entry["name"] for entry in second]


def test_the_percentile_of_the_budget_is_exported_too() -> None:
    d = data()
    d["budget"]["percentile"] = "p99"
    names = [entry["name"] for entry in json.loads(export([parse_report(d)], "github-action-benchmark"))]
    assert [name.split(" / ")[-1] for name in names][:2] == ["p50", "p99"]


@pytest.mark.parametrize("status", STATUSES)
def test_junit_fails_exactly_what_failed(status: str) -> None:
    root = ElementTree.fromstring(export([variant(status)], "junit"))
    suite = root.find("testsuite")
    assert suite is not None
    cases = {case.get("name"): case for case in suite.findall("testcase")}
    failed = {name for name, case in cases.items() if case.find("failure") is not None}
    skipped = {name for name, case in cases.items() if case.find("skipped") is not None}
    expected = {"verdict"} if status not in ("within_budget", "unverified") else set()
    if status == "not_equivalent":
        expected |= {"thin = ONNX", "top-1 agreement"}
    assert failed == expected
    assert int(suite.get("failures", "-1")) == len(failed)
    assert int(suite.get("skipped", "-1")) == len(skipped)
    assert int(suite.get("tests", "-1")) == len(cases)
    assert ("verdict" in skipped) == (status == "unverified")


@pytest.mark.parametrize("zone", ["+00:00", "Z"])
def test_junit_has_the_time_without_a_zone(zone: str) -> None:
    d = data()
    d["provenance"]["created"] = f"2026-11-21T10:42:07{zone}"
    (suite,) = ElementTree.fromstring(export([parse_report(d)], "junit"))
    assert suite.get("timestamp") == "2026-11-21T10:42:07"


def test_junit_survives_characters_that_xml_cannot_hold() -> None:
    d = data()
    d["health"][0]["message"] = "bell \x07 and <tag> & \ud83d"
    root = ElementTree.fromstring(export([parse_report(d)], "junit"))
    said = [case.findtext("system-out") for case in root.iter("testcase") if case.get("name") == "health: loss"]
    assert said == ["bell  and <tag> & "]


def test_step_summary_is_appended_where_github_wants_it(tmp_path: Path) -> None:
    path = tmp_path / "summary.md"
    path.write_text("before\n")
    assert write_step_summary(runs(), {"GITHUB_STEP_SUMMARY": str(path)}) == path
    text = path.read_text()
    assert text.startswith("before\n\n# 5 runs of resnet20")
    assert write_step_summary(runs(), {}) is None
    assert path.read_text() == text


def test_step_summary_stays_inside_githubs_limit(tmp_path: Path) -> None:
    path = tmp_path / "summary.md"
    path.write_text("x" * (SUMMARY_LIMIT - 2000))
    d = data()
    d["provenance"]["model"] = "<img src=x>"
    write_step_summary([parse_report(d)], {"GITHUB_STEP_SUMMARY": str(path)})
    assert path.stat().st_size <= SUMMARY_LIMIT
    assert "within budget: 2.07× &lt;img src=x&gt; on" in path.read_text()


def test_step_summary_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="GITHUB_STEP_SUMMARY"):
        write_step_summary(runs(), {"GITHUB_STEP_SUMMARY": str(tmp_path)})


@pytest.mark.parametrize("form", sorted(FORMATS))
def test_every_format_takes_one_and_several(form: str) -> None:
    one, several = export(runs()[:1], form), export(runs(), form)
    assert one.strip()
    assert len(several) > len(one) or form in ("html", "markdown")
    assert several != one


def test_unknown_format_names_the_nearest() -> None:
    with pytest.raises(BadInput, match="did you mean junit"):
        export(runs(), "junitxml")
    with pytest.raises(BadInput, match="nothing to report"):
        export([], "json")
