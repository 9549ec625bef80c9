"""Latency budgets: what was asked, parsed and judged."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from itertools import combinations

from passdeploy.errors import BadInput

UNITS_MS = {"s": 1e3, "ms": 1.0, "us": 1e-3, "µs": 1e-3, "ns": 1e-6}
PERCENTILES = ("p50", "p90", "p99")
SCOPES = ("engine", "end_to_end")

OVERSHOOT = 1.06
"""The loop aims at 1.00 to this many times the asked speed-up: much faster than asked has thrown accuracy away."""

INTERVAL_SLACK = 0.98
"""A speed-up is met when the lower end of its 95 % interval is at least this share of it as well."""

FASTEST = "fastest"
"""The other way round: with a minimum accuracy, the fastest structure that keeps it."""
LADDER = ("1.25x", "1.5x", "2x", "2.5x", "3x", "4x", "5x")
"""Speed-ups among which the fastest one is sought, by bisection, after one search for all of them."""


@dataclass(frozen=True)
class Budget:
    """A latency that the engine must meet.

    Attributes:
        asked: As typed, the unit in lower case: ``5ms``, ``800us``, ``2x``.
        latency_ms: For a budget in time.
        speedup: For a budget over the dense engine.
        percentile: p50, p90 or p99: what a budget in time is judged at.
        scope: ``engine`` (inputs already on the device) or ``end_to_end``.
    """

    asked: str
    latency_ms: float | None
    speedup: float | None
    percentile: str = "p50"
    scope: str = "engine"

    @property
    def percent(self) -> float:
        """The percentile as a number: 50, 90 or 99."""
        return float(self.percentile[1:])

    def target_ms(self, dense_ms: float) -> float:
        """The budget in milliseconds, for a dense engine that takes `dense_ms`."""
        if self.latency_ms is not None:
            return self.latency_ms
        assert self.speedup is not None
        return dense_ms / self.speedup

    def target_ratio(self, dense_ms: float) -> float:
        """The asked share of the dense engine's latency; above 1 when the dense engine is already inside."""
        return self.target_ms(dense_ms) / dense_ms


def parse_budget(text: str, percentile: str = "p50", scope: str = "engine") -> Budget:
    """Parses ``5ms``, ``800us``, ``0.01s`` or ``2x``.

    Raises:
        BadInput: No unit, not a number, not above zero, or a speed-up below 1.
    """
    if percentile not in PERCENTILES:
        raise BadInput(f"--percentile {percentile}: known: {', '.join(PERCENTILES)}")
    if scope not in SCOPES:
        raise BadInput(f"scope {scope}: known: {', '.join(SCOPES)}")
    asked = text.strip()
    match = re.fullmatch(r"([-+]?[0-9.]+(?:[eE][-+]?\d+)?|[-+]?nan|[-+]?inf)\s*(\S*)", asked, re.IGNORECASE)
    hint = "give a time with its unit (5ms, 800us) or a speed-up over the dense engine (2x)"
    if match is None:
        raise BadInput(f"--latency {asked!r}: not a latency; {hint}")
    try:
        value = float(match[1])
    except ValueError:
        raise BadInput(f"--latency {asked!r}: {match[1]!r} is not a number; {hint}") from None
    unit = match[2].lower().replace("\u03bc", "\u00b5")  # the Greek letter, which many keyboards have for micro
    if not unit:
        raise BadInput(f"--latency {asked!r}: has no unit; {hint}")
    if unit != "x" and unit not in UNITS_MS:
        raise BadInput(f"--latency {asked!r}: unknown unit {match[2]!r} (known: x, {', '.join(UNITS_MS)}); {hint}")
    amount = value * UNITS_MS.get(unit, 1.0)  # in milliseconds a number may be too large, or so small that it is none
    if not math.isfinite(amount) or amount <= 0:
        raise BadInput(f"--latency {asked!r}: must be a finite number above zero; {hint}")
    asked = asked[: match.start(2)] + unit  # one spelling: it names folders and rows, and pages look at its end
    if unit == "x":
        if value < 1:
            raise BadInput(f"--latency {asked!r}: a speed-up below 1x would be slower than the dense engine; {hint}")
        return Budget(asked, None, value, percentile, scope)
    return Budget(asked, amount, None, percentile, scope)


def parse_budgets(text: str | list[str], percentile: str = "p50", scope: str = "engine") -> tuple[Budget, ...]:
    """Parses one or several budgets, separated by commas; no two may ask for the same, however it is typed.

    ``fastest`` alone stands for all of `LADDER`.
    """
    items = [item.strip() for item in (text.split(",") if isinstance(text, str) else text)]
    if FASTEST in items:
        if len(items) > 1:
            raise BadInput(f"--latency {','.join(items)}: {FASTEST} stands alone, with --min-accuracy")
        items = list(LADDER)
    budgets = tuple(parse_budget(item, percentile, scope) for item in items if item)
    if not budgets:
        raise BadInput("--latency: nothing given; give a time with its unit (5ms) or a speed-up (2x)")
    for first, second in combinations(budgets, 2):
        if _same(first, second):
            twice = "" if first.asked == second.asked else f" ({first.asked} and {second.asked})"
            names = ",".join(budget.asked for budget in budgets)
            raise BadInput(f"--latency {names}: the same budget is given twice{twice}")
    return budgets


def _same(a: Budget, b: Budget) -> bool:
    """Whether two budgets ask for the same: one search and one folder are enough for them."""
    if a.speedup is not None and b.speedup is not None:
        return a.speedup == b.speedup
    times = a.latency_ms, b.latency_ms
    return times[0] is not None and times[1] is not None and math.isclose(times[0], times[1])
