"""Structures that were measured against a budget, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from passdeploy.budget import INTERVAL_SLACK, Budget
from passdeploy.structure import Structure


class Timing(Protocol):
    """One measured structure.

    Attributes:
        speedup: Dense over thin, interleaved; 0 where the structure could not be measured.
        low: Lower end of its 95 % interval.
        thin_ms: At the budget's percentile; None where there were too few samples.
        dense_ms: Likewise.
    """

    @property
    def speedup(self) -> float: ...
    @property
    def low(self) -> float: ...
    @property
    def thin_ms(self) -> float | None: ...
    @property
    def dense_ms(self) -> float | None: ...


@dataclass
class Candidate:
    """One structure that the loop measured.

    Attributes:
        structure: What was measured.
        asked_ms: The predicted latency that was allocated for.
        predicted_ms: What the model said of the structure.
        timings: What was measured, once or more often.
        budget: What it is held against.
        inside: Whether it meets the budget, by all of its measurements.
    """

    structure: Structure
    asked_ms: float
    predicted_ms: float
    timings: list[Timing]
    budget: Budget
    inside: bool = False

    @property
    def timing(self) -> Timing:
        """The measurement in the middle, in what the budget is in: time or speed-up (of two: the slower one).

        Of those that there are: what a killed child left counts nowhere, as long as anything was measured.
        """
        measured = [timing for timing in self.timings if excess(self.budget, timing)] or self.timings
        return sorted(measured, key=lambda t: excess(self.budget, t))[(len(measured) - 1) // 2]

    @property
    def failed(self) -> bool:
        """Whether it has no latency: it does not compile or run, or there were too few samples."""
        return not any(excess(self.budget, t) for t in self.timings)


@dataclass
class FitResult:
    """What the loop found.

    Attributes:
        chosen: The structure that keeps the most inside the budget; when none is, the fastest that was measured.
        feasible: Whether `chosen` meets it.
        candidates: All turns, in order.
        plateau: `chosen` is much faster than asked, because nothing lies between it and what is too slow.
    """

    chosen: Candidate
    feasible: bool
    candidates: list[Candidate] = field(default_factory=list)
    plateau: bool = False

    @property
    def measurements(self) -> int:
        """How many measurements were taken."""
        return sum(len(c.timings) for c in self.candidates)


def meets(budget: Budget, timing: Timing, slack: float = 1.0) -> bool:
    """Whether a measurement is inside the budget (design, section 5).

    Args:
        budget: What was asked.
        timing: What was measured.
        slack: Above 1: a margin that must be kept.
    """
    if budget.latency_ms is not None:
        return timing.thin_ms is not None and timing.thin_ms * slack <= budget.latency_ms
    assert budget.speedup is not None
    return timing.speedup >= budget.speedup * slack and timing.low >= INTERVAL_SLACK * budget.speedup


def excess(budget: Budget, timing: Timing) -> float:
    """How much faster than asked: 1 is exactly on the budget, above is faster."""
    if budget.latency_ms is not None:
        return budget.latency_ms / timing.thin_ms if timing.thin_ms else 0.0
    assert budget.speedup is not None
    return timing.speedup / budget.speedup
