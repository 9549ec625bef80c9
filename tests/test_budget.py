"""Budgets: what is asked, in which unit, and what is refused."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from passdeploy.budget import UNITS_MS, parse_budget, parse_budgets
from passdeploy.config import make_config
from passdeploy.errors import BadInput

positive = st.floats(1e-3, 1e6, allow_nan=False)


@given(value=positive, unit=st.sampled_from(sorted(UNITS_MS)), space=st.sampled_from(["", " "]))
def test_times(value: float, unit: str, space: str) -> None:
    budget = parse_budget(f" {value!r}{space}{unit} ")
    assert budget.latency_ms == pytest.approx(value * UNITS_MS[unit])
    assert budget.speedup is None
    assert budget.target_ms(7.0) == budget.latency_ms
    assert budget.target_ratio(7.0) == pytest.approx(budget.target_ms(7.0) / 7)


@given(value=st.floats(1, 1e6), dense=positive)
def test_speed_ups(value: float, dense: float) -> None:
    budget = parse_budget(f"{value!r}x")
    assert budget.speedup == value
    assert budget.target_ms(dense) == pytest.approx(dense / value)
    assert budget.target_ratio(dense) <= 1


def test_the_same_time_in_all_units() -> None:
    same = ["5ms", "5000us", "5000µs", "5000\u03bcs", "0.005s", "5000000ns", "5e0ms", "5MS"]
    assert all(parse_budget(text).latency_ms == pytest.approx(5) for text in same)


def test_it_is_kept_as_typed_but_for_the_case_of_its_unit() -> None:
    assert [budget.asked for budget in parse_budgets(" 2x, 5MS ,3X")] == ["2x", "5ms", "3x"]
    assert make_config({"latency": "1e1X, 5 Ms"}).latency == ("1e1x", "5 ms")
    with pytest.raises(BadInput, match="given twice"):
        parse_budgets("2x,2X")
    assert [budget.asked for budget in parse_budgets(["2x", "800us"])] == ["2x", "800us"]
    assert parse_budget("2x", "p99", "end_to_end").percentile == "p99"


@pytest.mark.parametrize("text", ["2x,2.0x", "2x,3x,2 x", "1e1x,10x", "5ms,5000us", "300us,0.0003s", "7us,7\u03bcs"])
def test_one_budget_typed_in_two_ways_is_given_twice(text: str) -> None:
    first, last = text.split(",")[0], text.split(",")[-1].replace("\u03bc", "\u00b5")
    with pytest.raises(BadInput, match=rf"given twice \({first} and {last}\)"):
        parse_budgets(text)
    with pytest.raises(BadInput, match="given twice"):
        make_config({"latency": text.split(",")})


def test_budgets_that_lie_close_together_are_two() -> None:
    assert len(parse_budgets("2x,2.001x,2ms,2us,2.0001ms")) == 5


@given(st.text(max_size=8))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    try:
        budget = parse_budget(text)
    except BadInput as error:
        assert "\n" not in str(error)
        assert "5ms" in str(error)
    else:
        value = budget.latency_ms if budget.speedup is None else budget.speedup
        assert value is not None
        assert math.isfinite(value)
        assert value > 0


@pytest.mark.parametrize(
    "text",
    ["5", "ms", "0x", "0ms", "-1ms", "nanms", "infx", "nan", "0.99x", "1..2ms", "5 m s", "5mss", "1e999ms", "x",
     "9e307s", "1e-320ns"],  # the last two are numbers, but not in milliseconds
)  # fmt: skip
def test_refused(text: str) -> None:
    with pytest.raises(BadInput, match="give a time with its unit"):
        parse_budget(text)


def test_other_refusals() -> None:
    for text in ("", " , ", "2x,2x"):
        with pytest.raises(BadInput, match="--latency"):
            parse_budgets(text)
    with pytest.raises(BadInput, match="p50, p90, p99"):
        parse_budget("2x", "p95")
    with pytest.raises(BadInput, match="engine, end_to_end"):
        parse_budget("2x", scope="host")
