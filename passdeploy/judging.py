"""What was measured, judged by what was asked."""

from __future__ import annotations

from typing import Any

from passdeploy.budget import INTERVAL_SLACK, Budget


def judge(budget: Budget, bench: dict[str, Any], unchanged: bool = False) -> str:
    """The verdict on a measured engine (design, section 5, CLI).

    Args:
        budget: What was asked.
        bench: What was measured.
        unchanged: The engine is that of the dense network itself: on which side of 1 its ratio falls is chance, so that
            for 1x the interval alone decides.
    """
    if budget.latency_ms is not None:
        value = bench["thin"][budget.percentile]
        return "within_budget" if value is not None and value <= budget.latency_ms else "over_budget"
    assert budget.speedup is not None
    ratio, low = bench["ratio"]["value"], bench["ratio"]["low"] or 0.0
    fast_enough = ratio >= budget.speedup or (unchanged and budget.speedup == 1)
    return "within_budget" if fast_enough and low >= INTERVAL_SLACK * budget.speedup else "over_budget"


def meets_budget(budget: Budget, times: dict[str, Any]) -> bool | None:
    """`judge` on another engine; None where its percentile could not be told."""
    if budget.latency_ms is not None and times["latency_ms"][budget.percentile] is None:
        return None
    return judge(budget, {"thin": times["latency_ms"], "ratio": times["ratio"]}) == "within_budget"


def asked_ms(budget: Budget, dense_ms: float | None) -> float | None:
    """The budget in milliseconds at its percentile; None of a speed-up where that of the dense engine is not known."""
    return budget.latency_ms if dense_ms is None else budget.target_ms(dense_ms)


def ratio_of(bench: dict[str, Any]) -> tuple[float, tuple[float, float] | None]:
    """A ratio with its interval; None where an end of it is not known."""
    value, low, high = (bench["ratio"][key] for key in ("value", "low", "high"))
    return value, None if low is None or high is None else (low, high)
