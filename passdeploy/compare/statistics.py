"""What rows say: means over seeds, paired differences with their intervals, speed-up at equal accuracy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from passdeploy.budget import parse_budget
from passdeploy.compare.rows import Row

# Student's t, two-sided 95 %, by degrees of freedom.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
        2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)  # fmt: skip


def t95(freedom: int) -> float:
    """Two-sided 95 % quantile of Student's t; the normal distribution's correction beyond 30 degrees of freedom."""
    if freedom < 1:
        return math.inf
    return _T95[freedom - 1] if freedom <= len(_T95) else 1.95996 + 2.37 / freedom + 2.8 / freedom**2


@dataclass(frozen=True)
class Mean:
    """A mean over seeds.

    Attributes:
        value: The mean.
        half: Half the width of its 95 % interval (Student's t); None with a single seed.
        n: Seeds.
    """

    value: float
    half: float | None
    n: int


def mean(values: Sequence[float]) -> Mean | None:
    """Mean with its interval; None of nothing."""
    n = len(values)
    if n == 0:
        return None
    middle = math.fsum(values) / n
    if n == 1:
        return Mean(middle, None, 1)
    deviation = math.sqrt(math.fsum((v - middle) ** 2 for v in values) / (n - 1))
    return Mean(middle, t95(n - 1) * deviation / math.sqrt(n), n)


@dataclass(frozen=True)
class Cell:
    """One method at one budget.

    Attributes:
        method: Name.
        budget: As typed.
        accuracy: Over the seeds whose network computes what its engine does; those over budget are among them.
        ratio: Measured speed-up, over the same seeds.
        reduction: Times fewer MACs.
        seconds: Search and fine-tuning.
        seeds: Runs, those that failed included.
        statuses: One per seed.
        difference: Accuracy minus the reference's, seed by seed; None for the reference itself.
        over_budget: How many of the seeds in `accuracy` are over budget: their accuracy is that of a slower network.
    """

    method: str
    budget: str
    accuracy: Mean | None
    ratio: Mean | None
    reduction: Mean | None
    seconds: float
    seeds: int
    statuses: tuple[str, ...]
    difference: Mean | None
    over_budget: int


def _speed(text: str) -> tuple[bool, float]:
    """Budgets by how fast they ask to be: ``3x`` after ``2x``, ``800us`` after ``5ms``; factors after times."""
    asked = parse_budget(text)
    return (asked.speedup is not None, asked.speedup or -(asked.latency_ms or 0.0))


def budgets(rows: Sequence[Row]) -> list[str]:
    """The budgets, from easy to hard."""
    return sorted({row.budget for row in rows}, key=_speed)


def reference_of(rows: Sequence[Row]) -> str | None:
    """What the others are compared with: ``pass`` where it is among them, else the first."""
    names = [row.method for row in rows]
    return "pass" if "pass" in names else (names[0] if names else None)


def cells(rows: Sequence[Row], split: str, reference: str | None = None) -> list[Cell]:
    """All methods at all budgets, best first within a budget."""
    rows = [judged(row) for row in rows if row.split == split]
    reference = reference or reference_of(rows)
    found = []
    for budget in budgets(rows):
        at = [row for row in rows if row.budget == budget]
        base = {row.seed: row.accuracy for row in at if row.method == reference}
        here = []
        for method in dict.fromkeys(row.method for row in at):
            own = [row for row in at if row.method == method]
            pairs = [
                row.accuracy - other
                for row in own
                if row.accuracy is not None and (other := base.get(row.seed)) is not None
            ]
            here.append(
                Cell(
                    method=method,
                    budget=budget,
                    accuracy=mean([row.accuracy for row in own if row.accuracy is not None]),
                    ratio=mean([row.ratio for row in own if row.ratio is not None]),
                    reduction=mean([row.reduction for row in own if row.reduction is not None]),
                    seconds=math.fsum(row.seconds.get("search", 0) + row.seconds.get("finetune", 0) for row in own)
                    / len(own),
                    seeds=len(own),
                    statuses=tuple(row.status for row in own),
                    difference=None if method == reference else mean(pairs),
                    over_budget=sum(row.status == "over_budget" and row.accuracy is not None for row in own),
                )
            )
        middle = mean([accuracy for accuracy in base.values() if accuracy is not None])
        found += sorted(here, key=lambda cell: -_ranked(cell, middle))
    return found


def _ranked(cell: Cell, reference: Mean | None) -> float:
    """What an accuracy counts for in the order: a method that lacks a hard seed is no better for it."""
    if cell.difference is not None and reference is not None:
        return reference.value + cell.difference.value
    return cell.accuracy.value if cell.accuracy else -1.0


def judged(row: Row) -> Row:
    """Without the accuracy of a network that its engine does not compute: nothing of it was shipped."""
    return replace(row, accuracy=None, ratio=None, macs=None) if row.status == "not_equivalent" else row


def speed_at(curve: Sequence[tuple[float, float]], accuracy: float) -> float | None:
    """The speed-up at which a method still has `accuracy`, linear between its budgets.

    Args:
        curve: (speed-up, accuracy), the dense network's (1, ...) among them.
        accuracy: To be kept.

    Returns:
        None when the method never has it, or still has it at its fastest: beyond that nothing is known.
    """
    points = sorted(curve)
    if not points or points[-1][1] >= accuracy:
        return None
    for (x0, y0), (x1, y1) in reversed(list(pairwise(points))):
        if y0 >= accuracy > y1:
            return x0 + (x1 - x0) * (y0 - accuracy) / (y0 - y1)
    return None


def curve(rows: Sequence[Row], method: str, split: str) -> list[tuple[float, float]]:
    """(speed-up or reduction, accuracy), means over seeds per budget, from the dense network on.

    Not of what is trained from scratch: at 1x it would not be the dense network.
    """
    own = [judged(row) for row in rows if row.split == split and row.method == method]
    if not own:
        return []
    # In a lower precision the dense engine's accuracy is known where a budget was reached.
    dense = [row.dense_accuracy for row in own if row.accuracy is not None] or [row.dense_accuracy for row in own]
    points = [] if method == "scratch" else [(1.0, math.fsum(dense) / len(dense))]
    for budget in budgets(own):
        at = [
            (x, row.accuracy) for row in own if row.budget == budget and (x := place(row)) and row.accuracy is not None
        ]
        if at:
            points.append((math.fsum(x for x, _ in at) / len(at), math.fsum(y for _, y in at) / len(at)))
    return sorted(points)


def place(row: Row) -> float | None:
    """Where a row stands on its axis: measured speed-up, or times fewer MACs."""
    return row.ratio if row.axis == "latency" else row.reduction


@dataclass(frozen=True)
class EqualAccuracy:
    """How fast a method is where it is as accurate as the reference at one of its budgets.

    Over the seeds that both have: another seed is another accuracy. Where budgets are in MACs, "fast" is how many times
    fewer of them there are.

    Attributes:
        method: Compared with the reference.
        budget: Of the reference.
        accuracy: The reference's.
        reference_speed: The reference's.
        speed: The method's; None outside what was run.
    """

    method: str
    budget: str
    accuracy: float
    reference_speed: float
    speed: float | None


def equal_accuracy(rows: Sequence[Row], split: str, reference: str | None = None) -> list[EqualAccuracy]:
    """Speed-up at equal accuracy, by interpolation over the budgets."""
    rows = [judged(row) for row in rows if row.split == split]
    reference = reference or reference_of(rows)
    found = []
    for budget in budgets(rows):
        at = {
            row.seed: (x, row.accuracy)
            for row in rows
            if row.budget == budget and row.method == reference and (x := place(row)) and row.accuracy is not None
        }
        if not at:
            continue
        for method in dict.fromkeys(row.method for row in rows):
            if method == reference:
                continue
            both = at.keys() & _seeds(rows, method)
            own = [row for row in rows if row.method == method and row.seed in both]
            pairs = [pair for seed, pair in at.items() if seed in both or not both]
            speed, accuracy = (math.fsum(values) / len(pairs) for values in zip(*pairs, strict=True))
            other = speed_at(curve(own, method, split), accuracy)
            found.append(EqualAccuracy(method, budget, accuracy, speed, other))
    return found


def _seeds(rows: Sequence[Row], method: str) -> set[int]:
    """Those with which a method has an accuracy at each budget at which it has any."""
    at: dict[str, set[int]] = {}
    for row in rows:
        if row.method == method and row.accuracy is not None:
            at.setdefault(row.budget, set()).add(row.seed)
    return set.intersection(*at.values()) if at else set()
