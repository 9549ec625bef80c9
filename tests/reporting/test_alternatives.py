# ruff: noqa: RUF001  (reports use real multiplication and minus signs)
"""What else could be done, in words and as a table."""

from __future__ import annotations

from typing import Any

import pytest

from passdeploy.errors import BadInput
from passdeploy.reporting.alternatives import HEAD, missing, rows, said, session
from passdeploy.reporting.files import parse_report
from passdeploy.reporting.html import render_html
from passdeploy.reporting.markdown import render_markdown
from passdeploy.reporting.schema import Report
from tests.reporting.variants import data, variant


def with_options(*options: dict[str, Any], **changes: Any) -> Report:
    """The example with other lower precisions, made from its int8."""
    d = data() | changes
    int8 = next(option for option in d["alternatives"]["precisions"] if option["precision"] == "int8")
    d["alternatives"]["precisions"] = [int8 | option for option in options]
    return parse_report(d)


def test_the_table_has_the_dense_the_pruned_and_each_lower_precision() -> None:
    report = variant("within_budget")
    table = {row[0]: dict(zip(HEAD, row, strict=True)) for row in rows(report)}
    assert list(table) == ["dense fp32", "pruned fp32", "dense int8"]
    assert table["dense int8"] == {
        "engine": "dense int8",
        "speed-up": "1.17×",
        "95 %": "1.16 to 1.18",
        "latency": "497 µs",
        "accuracy": "93.18 %",
        "change": "−0.13 points",
        "engine size": "332 kB",
        "in budget": "no",
    }
    assert table["pruned fp32"]["in budget"] == "yes"
    assert (table["dense fp32"]["engine size"], table["pruned fp32"]["engine size"]) == ("1.11 MB", "503 kB")
    assert missing(report) == [("dense fp16", "fp16 is not offered on a CPU, which a CPU computes in fp32")]


@pytest.mark.parametrize(
    ("options", "status", "wanted"),
    [
        (
            [{"meets_budget": False}],
            "within_budget",
            "Dense int8 does not meet the budget of 2× (291 µs): it is 1.17× faster, −0.13 points.",
        ),
        (
            [{"meets_budget": False, "speedup": 2.14}],
            "within_budget",
            "Dense int8 does not meet the budget of 2× (291 µs): it is 2.14× faster, −0.13 points, but that was "
            "measured too unsteadily to count on it.",
        ),
        (
            [{"meets_budget": True, "speedup": 2.3}],
            "within_budget",
            "Dense int8 (2.30× faster, −0.13 points) meets the budget of 2× (291 µs) as well, without pruning.",
        ),
        (
            [{"meets_budget": True, "speedup": 2.3}, {"precision": "fp8", "meets_budget": True, "speedup": 2.5}],
            "over_budget",
            "Dense int8 (2.30× faster, −0.13 points) and dense fp8 (2.50× faster, −0.13 points) meet the budget of 2× "
            "(291 µs), without pruning.",
        ),
        (
            [{"meets_budget": False, "speedup": 0.8}, {"precision": "fp16", "meets_budget": False, "speedup": 0.9}],
            "within_budget",
            "None of them meets the budget of 2× (291 µs): the fastest, dense fp16, is 1.11× slower, −0.13 points.",
        ),
        (
            [{"meets_budget": None, "latency_ms": None, "speedup": None}],
            "within_budget",
            "Nothing was measured, so whether one of them meets the budget of 2× (291 µs) is not known.",
        ),
        (
            [{"meets_budget": None}],
            "within_budget",
            "Too few calls were timed to tell p50, so whether one of them meets the budget of 2× (291 µs) is not "
            "known.",
        ),
        (
            [{"reason": "not offered"}],
            "within_budget",
            "There is no lower precision of the dense network to compare with here.",
        ),
    ],
)
def test_a_sentence_says_which_of_them_meets_the_budget(
    options: list[dict[str, Any]], status: str, wanted: str
) -> None:
    report = with_options(*options, status=status)
    assert said(report) == wanted
    assert wanted in render_markdown(report)
    assert wanted in render_html(report)


@pytest.mark.parametrize(
    ("accuracy", "said_of_it", "cell"),
    [
        (0.62, "meets the budget of 2× (291 µs), but not the 90.00 % that were asked for.", "yes, too inaccurate"),
        (None, "meets the budget of 2× (291 µs), but nobody knows whether with the 90.00 % asked for.", "yes"),
        (0.91, "meets the budget of 2× (291 µs) as well, without pruning.", "yes"),
    ],
)
def test_what_the_user_ruled_out_is_not_recommended(accuracy: float | None, said_of_it: str, cell: str) -> None:
    report = with_options(
        {"meets_budget": True, "speedup": 2.3, "accuracy": accuracy},
        status="within_budget",
        budget=data()["budget"] | {"min_accuracy": 0.9, "judged_accuracy": 0.92},
    )
    assert said(report).endswith(said_of_it)
    assert rows(report)[-1][-1] == cell


def test_what_is_missing_stands_under_the_table() -> None:
    page = render_markdown(variant("within_budget"))
    assert "- dense fp16: fp16 is not offered on a CPU, which a CPU computes in fp32." in page
    assert "dense fp16: fp16 is not offered" in render_html(variant("within_budget"))


def test_latencies_of_another_session_are_called_so() -> None:
    d = data()
    d["alternatives"]["dense_latency_ms"] = d["dense"]["latency_ms"] | {"p50": 0.658}
    said = "that took 658 µs"
    assert said in session(parse_report(d))
    assert said in render_html(parse_report(d)) and said in render_markdown(parse_report(d))
    unmeasured = variant("infeasible").to_json() | {"alternatives": d["alternatives"]}
    assert session(parse_report(unmeasured)) == "", "the row of the dense engine is of that session itself"


def test_without_the_section_nothing_is_said() -> None:
    d = data()
    del d["alternatives"]
    report = parse_report(d)
    assert rows(report) == missing(report) == []
    for page in (render_markdown(report), render_html(report)):
        assert "What else could be done" not in page


def test_an_unattached_target_claims_no_latency_of_them_either() -> None:
    d = variant("unverified").to_json()
    d["alternatives"]["precisions"][1]["latency_ms"] = data()["alternatives"]["precisions"][1]["latency_ms"]
    with pytest.raises(BadInput, match=r"latencies and speedup\.latency must be null"):
        parse_report(d)
