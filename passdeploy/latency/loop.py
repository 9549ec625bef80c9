"""The closed loop: allocate, measure the engine, correct the prediction, until the engine is just inside the budget.

The loop knows nothing of engines or networks: `allocate` gives a structure for a predicted latency, `measure` times it
against the dense engine. Given the same measurements it decides the same, so a logged run can be replayed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from passdeploy.budget import OVERSHOOT, Budget
from passdeploy.structure import Structure

INTERVAL_SLACK = 0.98
"""A speed-up budget holds when the lower end of the ratio's interval is at least this share of it."""
AIM = 1.02
"""The first guess asks for this much more than the budget: the middle of what is accepted, noise considered."""
HALVINGS = 7
"""How often the gap between a target that was met and one that was missed is halved."""


class Timing(Protocol):
    """One measured structure.

    Attributes:
        speedup: Dense over thin, interleaved.
        low: Lower end of its 95 % interval.
        thin_ms: At the budget's percentile; None where there were too few samples.
        dense_ms: Likewise.
    """

    speedup: float
    low: float
    thin_ms: float | None
    dense_ms: float | None


@dataclass(frozen=True)
class Candidate:
    """One turn of the loop.

    Attributes:
        structure: What was measured.
        asked_ms: The predicted latency that was allocated for.
        predicted_ms: What the model said of the structure.
        timing: What was measured.
        inside: Whether it meets the budget.
    """

    structure: Structure
    asked_ms: float
    predicted_ms: float
    timing: Timing
    inside: bool


@dataclass
class FitResult:
    """What the loop found.

    Attributes:
        chosen: The slowest structure that meets the budget; when none does, the fastest that was measured.
        feasible: Whether `chosen` meets it.
        candidates: All turns, in order.
    """

    chosen: Candidate
    feasible: bool
    candidates: list[Candidate] = field(default_factory=list)


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


def close_loop(
    allocate: Callable[[float], tuple[Structure, float] | None],
    fastest: Callable[[], tuple[Structure, float]],
    measure: Callable[[Structure], Timing],
    budget: Budget,
    dense_ms: float,
    most: int = 12,
    margin: float = 1.005,
) -> FitResult:
    """Finds the slowest structure whose measured engine meets the budget.

    Args:
        allocate: Predicted latency in ms -> (structure, its prediction); None when nothing is that fast.
        fastest: The fastest structure there is, with its prediction.
        measure: Times a structure against the dense engine.
        budget: What is asked.
        dense_ms: The dense engine, by the same model that predicts.
        most: Measured structures at most.
        margin: What is accepted keeps this much distance from the budget, so that the final measurement holds too.
    """
    candidates: list[Candidate] = []
    known: dict[str, Candidate] = {}

    def turn(asked: float, found: tuple[Structure, float]) -> Candidate:
        structure, predicted = found
        key = structure.digest()
        if key not in known:
            timing = measure(structure)
            known[key] = Candidate(structure, asked, predicted, timing, meets(budget, timing, margin))
            candidates.append(known[key])
        return known[key]

    # Between `met` (a target whose structure is inside) and `missed` (one that is not) the answer lies.
    met: float | None = None
    missed: float | None = None
    target = budget.target_ms(dense_ms) / AIM
    halvings = 0
    while len(candidates) < most and halvings < HALVINGS:
        found = allocate(target)
        if found is None:
            least = turn(target, fastest())
            if not least.inside:
                break
            met = max(met or 0.0, least.predicted_ms)
            candidate = least
        else:
            candidate = turn(target, found)
        over = excess(budget, candidate.timing)
        if candidate.inside:
            if over <= OVERSHOOT:
                break
            met = target if met is None else max(met, target)
        else:
            missed = target if missed is None else min(missed, target)
        if met is not None and missed is not None:
            if missed <= met * 1.002:
                break
            halvings += 1
            target = (met + missed) / 2
        else:
            # Correct the prediction by what was measured, and aim at the middle of what is accepted.
            corrected = target * over / AIM
            target = max(corrected, target * 1.01) if candidate.inside else min(corrected, target * 0.99)
            target = min(target, dense_ms * 0.999) if candidate.inside else target
            if candidate.inside and target <= (met or 0.0):
                break
    inside = [c for c in candidates if c.inside]
    if inside:
        return FitResult(min(inside, key=lambda c: excess(budget, c.timing)), True, candidates)
    barely = [c for c in candidates if meets(budget, c.timing)]
    pool = barely or candidates
    chosen = (
        min(pool, key=lambda c: excess(budget, c.timing))
        if barely
        else max(pool, key=lambda c: excess(budget, c.timing))
    )
    return FitResult(chosen, bool(barely), candidates)
