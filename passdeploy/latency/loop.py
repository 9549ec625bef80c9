"""The closed loop: allocate, measure the engine, correct the prediction, until the engine is just inside the budget.

The loop knows nothing of engines or networks: `allocate` gives a structure for a predicted latency, `measure` times it
against the dense engine. Given the same measurements it decides the same, so a logged run can be replayed.

The model proposes, the measurement decides: the loop is a search for the predicted latency to ask for, bracketed by
what was measured. Latency is a staircase, so there may be nothing just inside; and it is noisy, so what decides in the
end (the structure chosen, and a neighbour whose failure would cost much accuracy) is measured a second time, a third
time where the two differ, and again and again where the three say that one measurement is worth little here.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

from passdeploy.budget import OVERSHOOT, Budget
from passdeploy.latency.candidates import Candidate, FitResult, Timing, excess, meets
from passdeploy.structure import Structure

AIM = 1.035
"""Where in the accepted window of 1.00 to 1.06 times the asked speed-up the loop aims."""
AGREE = 0.02
"""Two measurements of one structure that differ by more than this call for a third."""
SURE = 0.01
"""Relative standard error of a median up to which it is believed."""
MOST_TIMINGS = 9
"""How often what decides is measured at most, where measurements scatter. Beyond the third they are not counted against
the limit on measurements: a disturbed machine costs time, not candidates."""
WIDEST_MARGIN = 1.05
"""Distance from the budget that is kept at most where measurements scatter."""
TIGHT = 1.015
"""Targets closer than this are not told apart: a jump between them is a step of the staircase."""
SECANTS = 4
"""So many candidates are placed by interpolation; then the bracket is halved, which no staircase can slow down."""
ALLOCATIONS = 40
"""Allocations at most: they cost milliseconds, and most of them give a structure that is known already."""
MISSES = 3
"""So many structures outside in a row, and the fastest one is tried; unless one of them was `NEAR`."""
NEAR = 0.93
"""A miss by less than this is no sign that nothing can be reached."""
GAP = 1.10
"""A structure this much faster than asked is only taken when narrowing the next slower one gives nothing between."""
BARELY = 3
"""Where nothing keeps the margin, so many of the fastest are measured three times: the luckiest of many single
measurements is inside by chance."""
STRIDES, STRIDE = 6, 0.9
"""What is done when measurements contradict each other: so many more structures, each predicted this much faster."""


class _Search:
    """The measured candidates, and the bracket of targets between which the answer lies."""

    def __init__(self, measure: Callable[[Structure], Timing], budget: Budget, most: int, margin: float) -> None:
        self.measure, self.budget, self.most, self.margin = measure, budget, most, margin
        self.known: dict[str, Candidate] = {}
        self.count = 0
        self.asked: list[tuple[float, Candidate]] = []
        self.floor_failed = False

    @property
    def left(self) -> int:
        return self.most - self.count

    def over(self, candidate: Candidate) -> float:
        """Its excess over all of its measurements."""
        logs = [math.log(max(excess(self.budget, t), 1e-9)) for t in candidate.timings]
        return math.exp(statistics.median(logs))

    def error(self, candidate: Candidate) -> float:
        """Relative standard error of the median of its measurements; 0 where there are too few to say."""
        logs = [math.log(max(excess(self.budget, t), 1e-9)) for t in candidate.timings]
        # That of the median of normal noise is pi / 2 times the mean's in variance.
        return math.sqrt(math.pi / 2 / len(logs)) * statistics.stdev(logs) if len(logs) >= 3 else 0.0

    def scatter(self) -> float:
        """Relative standard deviation of single measurements, over what was measured more often; 0 before that."""
        several = [[math.log(max(excess(self.budget, t), 1e-9)) for t in c.timings] for c in self.known.values()]
        several = [logs for logs in several if len(logs) >= 3]
        return math.sqrt(statistics.fmean(map(statistics.variance, several))) if several else 0.0

    def needed(self, candidate: Candidate) -> float:
        """The excess from which it is inside: what ships is measured anew, and scatters as these measurements do."""
        return max(self.margin, min(1 + self.error(candidate), WIDEST_MARGIN))

    def take(self, candidate: Candidate) -> None:
        candidate.timings.append(self.measure(candidate.structure))
        self.count += len(candidate.timings) <= 3
        # The interval's condition alone: the ratio itself is judged over all measurements together.
        certain = sum(meets(self.budget, t, 0.0) for t in candidate.timings)
        candidate.inside = self.over(candidate) >= self.needed(candidate) and 2 * certain >= len(candidate.timings)

    def turn(self, target: float, found: tuple[Structure, float]) -> tuple[Candidate, bool]:
        """The candidate of an allocation, measured if it is new."""
        structure, predicted = found
        key = structure.digest()
        new = key not in self.known
        if new:
            self.known[key] = Candidate(structure, target, predicted, [], self.budget)
            self.take(self.known[key])
            # Where single measurements are known to scatter, one of them does not decide in either direction.
            if (scatter := self.scatter()) > AGREE and abs(math.log(self.over(self.known[key]))) < 2 * scatter:
                self.settle(self.known[key])
        self.asked.append((target, self.known[key]))
        return self.known[key], new

    def settle(self, candidate: Candidate, owed: int = 0) -> None:
        """A second measurement, a third where two disagree, more where three do not tell; `owed` are never too many."""
        if candidate.failed:
            return
        self.most = max(self.most, self.count + owed)
        while self.left > 0 and len(candidate.timings) < 3:
            if len(candidate.timings) == 2:
                a, b = (excess(self.budget, t) for t in candidate.timings)
                if abs(a - b) <= AGREE * b and (a >= self.margin) == (b >= self.margin):
                    return
            self.take(candidate)
        while 3 <= len(candidate.timings) < MOST_TIMINGS and not self.told(candidate):
            self.take(candidate)

    def told(self, candidate: Candidate) -> bool:
        """Whether its measurements say on which side of the budget it is."""
        error = self.error(candidate)
        return error <= SURE or abs(math.log(self.over(candidate) / self.margin)) > 3 * error

    def bracket(self) -> tuple[tuple[float, Candidate] | None, tuple[float, Candidate] | None]:
        """The loosest target that was met, and the tightest looser one that was missed."""
        met = max(((t, c) for t, c in self.asked if c.inside), key=lambda p: p[0], default=None)
        missed = min(
            ((t, c) for t, c in self.asked if not c.inside and (met is None or t > met[0])),
            key=lambda p: p[0],
            default=None,
        )
        return met, missed

    def near(self) -> bool:
        """Whether something that was measured is hardly outside."""
        return any(self.over(c) >= NEAR for c in self.known.values())

    def barely(self, candidate: Candidate) -> bool:
        """Whether it meets the budget without the margin; its first measurement picked it out, so others decide."""
        later = [meets(self.budget, t) for t in candidate.timings[1:]]
        return len(later) >= 2 and 2 * sum(later) > len(later) and self.over(candidate) >= 1

    def best(self) -> Candidate | None:
        """The one to choose: inside, not much faster than asked if possible, and then the one that keeps the most."""
        inside = [(t, c) for t, c in self.asked if c.inside]
        near = [(t, c) for t, c in inside if self.over(c) <= OVERSHOOT]
        return max(near or inside, key=lambda p: p[0])[1] if inside else None


def _next_target(search: _Search, first: float, longest: float) -> float | None:
    """Where to look next; None when there is nothing left between what was met and what was missed."""
    met, missed = search.bracket()
    if met is None and missed is None:
        return first
    if met is not None and missed is not None:
        gap = math.log(missed[0] / met[0])
        if gap <= math.log(TIGHT):
            return None
        high, low = math.log(search.over(met[1])), math.log(search.over(missed[1]))
        straight = high > low and len(search.known) <= SECANTS and not missed[1].failed
        share = (high - math.log(AIM)) / (high - low) if straight else 0.5
        return met[0] * math.exp(min(max(share, 0.15), 0.85) * gap)
    if met is not None:
        corrected = max(met[0] * search.over(met[1]) / AIM, met[0] * 1.01)
        return min(corrected, longest) if met[0] * TIGHT < longest else None
    assert missed is not None
    if missed[1].failed:  # it says nothing of how far away the budget is
        if not search.floor_failed:
            return missed[0] * STRIDE
        # Nothing faster is left to be tried: what is inside, if anything, lies between this and what can be measured.
        slow = min((t for t, c in search.asked if not c.failed), default=longest)
        fast = max(t for t, c in search.asked if c.failed and t < slow)
        return math.sqrt(slow * fast) if slow > TIGHT * fast else None
    target = missed[0] * max(search.over(missed[1]), 0.02) / AIM
    others = [(t, c) for t, c in search.asked if c is not missed[1] and not c.failed]
    if others:
        # Through the two fastest misses: what no structure can save (launch floors) makes latency affine at best.
        slower = min(others, key=lambda p: p[0])
        here, there = 1 / search.over(missed[1]), 1 / search.over(slower[1])
        if there > 1.01 * here:
            target = missed[0] - (here - 1 / AIM) * (slower[0] - missed[0]) / (there - here)
        else:  # on one tread of the staircase: take a stride
            target *= 0.85
    return min(max(target, 0.3 * missed[0]), missed[0] * 0.99)


def close_loop(
    allocate: Callable[[float], tuple[Structure, float] | None],
    fastest: Callable[[], tuple[Structure, float]],
    measure: Callable[[Structure], Timing],
    budget: Budget,
    dense_ms: float,
    most: int = 12,
    margin: float = 1.005,
    scale: float = 1.0,
) -> FitResult:
    """Finds the slowest structure whose measured engine meets the budget.

    Args:
        allocate: Predicted latency in ms -> (structure, its prediction); None when nothing is that fast.
        fastest: The fastest structure there is, with its prediction.
        measure: Times a structure against the dense engine.
        budget: What is asked.
        dense_ms: The dense engine, by the same model that predicts.
        most: Measurements at most; where they scatter or contradict each other, some more (`MOST_TIMINGS`, `STRIDES`).
        margin: What is accepted keeps this much distance from the budget, so that the final measurement holds too.
        scale: Predicted over measured latency of the dense engine: a profile may come from a faster machine, or hour.
    """
    search = _Search(measure, budget, most, margin)
    first = budget.target_ms(dense_ms / scale) * scale / AIM
    floor: Candidate | None = None
    for _ in range(ALLOCATIONS):
        # One measurement is kept back for the second opinion on what is chosen.
        target = _next_target(search, first, dense_ms) if search.left > 1 or search.count == 0 else None
        if target is not None:
            # Three misses and nothing inside: the fastest structure says whether there is anything to look for.
            stuck = floor is None and len(search.known) >= MISSES and search.best() is None and not search.near()
            found = None if stuck else allocate(target)
            if found is None:
                if floor is None:
                    least = fastest()
                    floor, _ = search.turn(min(target, least[1]), least)
                    search.floor_failed = floor.failed
                else:
                    search.asked.append((target, floor))
                if not floor.inside:
                    search.settle(floor)
                if not floor.inside and not floor.failed:
                    break
                candidate, new = floor, True
            else:
                candidate, new = search.turn(target, found)
            if not (new and candidate.inside and search.over(candidate) <= OVERSHOOT):
                continue
        chosen = search.best()
        if chosen is None:
            break
        if search.over(chosen) > OVERSHOOT:
            # Before accuracy is thrown away, make sure that the neighbour is outside by more than an outlier.
            _, missed = search.bracket()
            if missed is not None and len(missed[1].timings) == 1 and search.left > 1:
                search.settle(missed[1])
                if missed[1].inside:
                    continue
        if len(chosen.timings) == 1 and search.left > 0:
            search.settle(chosen)
            if not chosen.inside:
                continue
            if search.over(chosen) > OVERSHOOT and search.left > 1:
                continue
        if target is None or search.over(chosen) <= OVERSHOOT:
            break
    while (chosen := search.best()) is not None and len(chosen.timings) == 1:
        search.settle(chosen, owed=2)  # measurements have run out, but what is chosen is never measured only once
    candidates = list(search.known.values())
    if chosen is None and floor is None:
        chosen = _stride(search, allocate, fastest)
        candidates = list(search.known.values())
    if chosen is not None:
        return FitResult(chosen, True, candidates, plateau=search.over(chosen) > OVERSHOOT)
    for candidate in sorted(candidates, key=search.over, reverse=True)[:BARELY]:
        while search.over(candidate) >= 1 and len(candidate.timings) < 3:
            search.take(candidate)
    barely = [c for c in candidates if search.barely(c)]
    if barely:
        return FitResult(min(barely, key=search.over), True, candidates)
    return FitResult(max(candidates, key=search.over), False, candidates)


def _stride(
    search: _Search,
    allocate: Callable[[float], tuple[Structure, float] | None],
    fastest: Callable[[], tuple[Structure, float]],
) -> Candidate | None:
    """Goes on towards the fastest structure, with no eye for what lies between; None when that is outside as well.

    The measurements have run out between one that was inside only at first and those that are outside: on a disturbed
    machine they contradict each other. "Infeasible" is said of the fastest structure only, measured twice or more.
    """
    target = min(asked for asked, _ in search.asked)
    search.most += 2 * (STRIDES + 1)
    for turn in range(STRIDES + 1):
        target *= STRIDE
        found = allocate(target) if turn < STRIDES else None
        candidate, _ = search.turn(target, fastest() if found is None else found)
        if candidate.inside or found is None:
            search.settle(candidate, owed=2)
        if candidate.inside or found is None:
            return candidate if candidate.inside else None
    raise AssertionError("the last turn is the fastest structure")


def close_gap(
    found: FitResult,
    narrow: Callable[[Structure, float], tuple[Structure, float] | None],
    measure: Callable[[Structure], Timing],
    budget: Budget,
    dense_ms: float,
    most: int = 6,
    margin: float = 1.005,
    scale: float = 1.0,
) -> FitResult:
    """Looks between a structure that is much faster than asked and the next slower one, which is outside.

    They often differ by a whole block, which the scores give up all at once; what lies between keeps the block and is
    narrower elsewhere.

    Args:
        found: By `close_loop`; returned as it is when it is not more than `GAP` faster than asked.
        narrow: (structure, predicted latency in ms) -> a narrower one with the same blocks, and its prediction; None
            when there is none.
        measure: As for `close_loop`.
        budget: What is asked.
        dense_ms: The dense engine, by the model that predicts.
        most: Measurements at most.
        margin: As for `close_loop`.
        scale: As for `close_loop`.
    """

    def over(candidate: Candidate) -> float:
        return excess(budget, candidate.timing)

    slower = [c for c in found.candidates if not c.inside and over(c) < over(found.chosen)]
    if not (found.feasible and over(found.chosen) > GAP and slower):
        return found
    start = max(slower, key=over)
    between = close_loop(
        lambda target_ms: narrow(start.structure, target_ms),
        lambda: (found.chosen.structure, found.chosen.predicted_ms),
        measure,
        budget,
        dense_ms,
        most,
        margin,
        scale,
    )
    known = {c.structure.digest(): c for c in found.candidates}
    for again in between.candidates:
        first = known.setdefault(again.structure.digest(), again)
        if first is not again:
            first.timings += again.timings
    candidates, chosen = list(known.values()), known[between.chosen.structure.digest()]
    still = meets(budget, found.chosen.timing)  # which was measured again, as the fastest there is
    if between.feasible and meets(budget, chosen.timing) and (over(chosen) < over(found.chosen) or not still):
        return FitResult(chosen, True, candidates, between.plateau)
    return FitResult(found.chosen, still, candidates, found.plateau and still)
