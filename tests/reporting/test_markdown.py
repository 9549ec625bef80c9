# ruff: noqa: RUF001  (reports use real multiplication and minus signs)
from __future__ import annotations

import re

import pytest

from passdeploy.reporting.comparison import render_comparison
from passdeploy.reporting.files import parse_report
from passdeploy.reporting.markdown import escape, render_markdown
from tests.reporting.variants import STATUSES, data, runs, variant


def tables(page: str) -> list[list[str]]:
    return [block.splitlines() for block in re.findall(r"(?:^\|.*\n?)+", page, re.MULTILINE)]


@pytest.mark.parametrize("page", [*(render_markdown(variant(s)) for s in STATUSES), render_comparison(runs(), "md")])
def test_all_rows_of_a_table_have_as_many_cells(page: str) -> None:
    assert tables(page)
    for rows in tables(page):
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1, rows


def test_the_headline_comes_first() -> None:
    page = render_markdown(variant("within_budget"))
    assert page.startswith(
        "# ✅ resnet20 on Fashion-MNIST: 2.07× faster at −0.59 points of top-1 accuracy\n\n**within budget**."
    )
    assert "| 95 % interval |  |  | 2.05 to 2.08 |" in page
    assert render_markdown(variant("unverified")).splitlines()[2].startswith("**unverified**. Nothing was measured")


def test_a_comparison_claims_no_measurement_that_nobody_made() -> None:
    page = render_comparison([*runs(), variant("unverified")], "md")
    assert "Measured on" not in page
    places = [line for line in page.splitlines() if line.startswith("- ")]
    assert [line.endswith(": 1, 1 of them not measured") for line in places] == ["A100" in line for line in places]
    assert len(places) == 2


def test_being_watched_takes_time_in_markdown_too() -> None:
    d = data() | {"layers": [{"name": "conv1", "dense_ms": 0.2, "pruned_ms": 0.1}]}
    assert "Being watched takes time" in render_markdown(parse_report(d))


def test_what_stays_whole_is_named_with_the_reason() -> None:
    d = data()
    d["frozen"] = {"odd_part": "untraceable", "fc": "outputs", "other": "untraceable"}
    page = render_markdown(parse_report(d))
    assert "<summary>3 not prunable</summary>" in page
    assert page.index(r"| odd\_part, other | untraceable |") < page.index("| fc | outputs |")
    del d["frozen"]
    assert "not prunable" not in render_markdown(parse_report(d))


def test_what_users_name_cannot_break_a_table() -> None:
    d = data()
    evil = "a|b\n\n# <img src=x> `c` [d](e)"
    d["groups"][0]["name"] = d["health"][0]["message"] = d["provenance"]["model"] = evil
    page = render_markdown(parse_report(d))
    assert "<img" not in page
    assert "\n# <" not in page
    for rows in tables(page):
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1


def test_escape_leaves_plain_words_alone() -> None:
    assert escape("layer1.0 conv, 3 of 4") == "layer1.0 conv, 3 of 4"
    assert escape("layer_1") == "layer\\_1"
