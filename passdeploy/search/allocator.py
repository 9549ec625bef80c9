"""From scores to a structure: which units to keep so that the predicted latency is inside the budget.

Scores are importances in units of loss: what removing the unit costs. Within a group the highest are kept; how many per
group is what an allocator decides. `LatencyAllocator` (ours, in a file of its own) loses as little as it can for the
milliseconds, whole blocks included; `GlobalAllocator` (the paper's rule) uses one threshold over all scores;
`UniformAllocator` keeps the same share everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np

from passdeploy.groups import Groups
from passdeploy.structure import Structure

Importance = Mapping[str, np.ndarray]
"""Per group, the importance (> 0) of each unit."""


class Predictor(Protocol):
    """What allocation needs of a latency model: kept units per group -> milliseconds."""

    def predict_many(self, widths: np.ndarray) -> np.ndarray:
        """Maps (n, groups) to (n,) milliseconds."""
        ...


@dataclass(frozen=True)
class Allocation:
    """A structure and how it came about.

    Attributes:
        structure: The kept units.
        widths: Kept units per group, in the groups' order.
        predicted_ms: By the latency model.
        price: Loss per millisecond of what would come back first; 0 when nothing was given up.
    """

    structure: Structure
    widths: np.ndarray
    predicted_ms: float
    price: float


def width_grids(groups: Groups, step: int, keep_at_least: float, depth: bool = True) -> list[np.ndarray]:
    """Widths that each group may take, ascending; the full width is among them unless another one is fixed.

    Args:
        groups: Of the network.
        step: Channels in which the target's latency moves (measured).
        keep_at_least: Share of the units below which no channel group falls.
        depth: Whether whole blocks may go.
    """
    grids = []
    for group in groups.groups:
        if group.kind == "depth":
            grids.append(np.array([0, 1] if depth else [1]))
            continue
        if group.fixed is not None:
            grids.append(np.array([group.fixed]))
            continue
        # Of what writes them: behind a flatten, a reader has many columns for each channel.
        channels = max((member.per_unit for member in group.members if member.side == "out"), default=1)
        units_per_step = max(1, step // channels)
        # A narrow group still gets a choice: half steps cost a little alignment, which the latency model knows.
        while units_per_step > 4 and group.units // units_per_step < 4:
            units_per_step //= 2
        floor = max(group.least, int(np.ceil(keep_at_least * group.units)))
        widths = [w for w in range(units_per_step, group.units, units_per_step) if w >= floor]
        grids.append(np.array([*widths, group.units]))
    return grids


class Allocator:
    """Shared parts: tables of what removing units costs, and structures from widths.

    Args:
        groups: Of the network.
        predictor: The latency model.
        grids: From `width_grids`.
    """

    def __init__(self, groups: Groups, predictor: Predictor, grids: Sequence[np.ndarray]) -> None:
        self.groups, self.predictor, self.grids = groups, predictor, list(grids)
        names = groups.names
        self.full = np.array([group.units for group in groups.groups])
        self.depth = np.array([group.kind == "depth" for group in groups.groups])
        # gates[d, g]: group g lies inside the branch of depth group d.
        self.gates = np.zeros((len(names), len(names)), dtype=bool)
        for row, group in enumerate(groups.groups):
            if group.kind == "depth":
                for name in groups.inner(group):
                    self.gates[row, names.index(name)] = True
        self._blocks = np.flatnonzero(self.depth)
        self._inside = self.gates[self._blocks].astype(float)  # of the other groups there is nothing to be multiplied
        self.dense_ms = float(predictor.predict_many(self.full[None].astype(float))[0])

    def holding(self, blocks: Mapping[str, bool]) -> Self:
        """The same, but these depth groups stay (True) or go (False) whatever their scores are."""
        grids = [
            np.array([int(blocks[name])]) if name in blocks else grid
            for name, grid in zip(self.groups.names, self.grids, strict=True)
        ]
        return type(self)(self.groups, self.predictor, grids)

    def tables(self, importance: Importance) -> np.ndarray:
        """cost[g, w]: summed importance of the units that go when the w most important of group g stay."""
        cost = np.zeros((len(self.full), int(self.full.max()) + 1))
        for g, group in enumerate(self.groups.groups):
            ascending = np.sort(np.asarray(importance[group.name], dtype=np.float64))
            removed = np.concatenate([[0.0], np.cumsum(ascending)])  # removed[k]: the k least important go
            cost[g, : group.units + 1] = removed[::-1]
        return cost

    def alive(self, widths: np.ndarray) -> np.ndarray:
        """Maps (n, groups) to booleans: False where a removed block makes the group's width meaningless."""
        removed = (widths[:, self._blocks] == 0).astype(float)
        return (removed @ self._inside) == 0

    def left(self, widths: np.ndarray) -> np.ndarray:
        """Units that a row of widths (groups,) leaves: none inside of removed blocks."""
        return widths * self.alive(widths[None])[0]

    def losses(self, widths: np.ndarray, cost: np.ndarray) -> np.ndarray:
        """Summed importance of what is removed, for each row of (n, groups)."""
        per_group = cost[np.arange(widths.shape[1])[None], widths]
        return (per_group * self.alive(widths)).sum(1)

    def predict(self, widths: np.ndarray) -> np.ndarray:
        """Milliseconds for each row of (n, groups); widths inside removed blocks do not matter."""
        return self.predictor.predict_many(np.where(self.alive(widths), widths, self.full[None]).astype(float))

    def structure(self, importance: Importance, widths: np.ndarray) -> Structure:
        """Keeps the `widths[g]` most important units of each group; the lower index wins a tie."""
        masks = {}
        for g, group in enumerate(self.groups.groups):
            scores = np.asarray(importance[group.name])
            keep = np.argsort(-scores, kind="stable")[: int(widths[g])]
            mask = np.zeros(group.units, dtype=bool)
            mask[keep] = True
            masks[group.name] = tuple(bool(kept) for kept in mask)
        return self.groups.canonical(Structure(masks))

    def fastest(self) -> np.ndarray:
        """The lowest widths that the grids allow."""
        return np.array([grid[0] for grid in self.grids])

    def widest(self) -> np.ndarray:
        """The highest widths that the grids allow: the dense network's, but for those that are fixed."""
        return np.array([grid[-1] for grid in self.grids])

    def solve(self, importance: Importance, target_ms: float) -> Allocation | None:
        """The best structure with a predicted latency of at most `target_ms`; None when none is that fast."""
        return self._allocation(importance, *self._widths(importance, target_ms))

    def narrow(
        self, importance: Importance, target_ms: float, start: np.ndarray, blocks: bool = False
    ) -> Allocation | None:
        """As `solve`, but from the widths `start`, and unless `blocks` with the blocks that it has; None: can't."""
        return None

    def _allocation(self, importance: Importance, widths: np.ndarray | None, price: float) -> Allocation | None:
        if widths is None:
            return None
        predicted = float(self.predict(widths[None])[0])
        return Allocation(self.structure(importance, widths), widths, predicted, price)

    def _widths(self, importance: Importance, target_ms: float) -> tuple[np.ndarray | None, float]:
        raise NotImplementedError


class _Ranked(Allocator):
    """One number decides all widths; the largest that meets the target is found by bisection."""

    def _at(self, importance: Importance, level: float) -> np.ndarray:
        raise NotImplementedError

    def _round(self, g: int, width: float) -> int:
        grid = self.grids[g]
        return int(grid[np.argmin(np.abs(grid - width))])

    def _widths(self, importance: Importance, target_ms: float) -> tuple[np.ndarray | None, float]:
        low, high, best = 0.0, 1.0, None  # level 0: as little as possible, 1: everything
        for level in (1.0, 0.0):
            widths = self._at(importance, level)
            if self.predict(widths[None])[0] <= target_ms:
                if level == 1.0:
                    return widths, 0.0
                best = widths
        if best is None:
            return None, 0.0
        for _ in range(30):
            level = (low + high) / 2
            widths = self._at(importance, level)
            if self.predict(widths[None])[0] <= target_ms:
                low, best = level, widths
            else:
                high = level
        return best, 0.0


class GlobalAllocator(_Ranked):
    """One threshold over the scores of all groups, as the paper has it."""

    def _at(self, importance: Importance, level: float) -> np.ndarray:
        everything = np.concatenate([np.asarray(importance[name]) for name in self.groups.names])
        threshold = np.quantile(everything, 1 - level) if level < 1 else -np.inf
        kept = [(np.asarray(importance[name]) >= threshold).sum() for name in self.groups.names]
        return np.array([self._round(g, width) for g, width in enumerate(kept)])


class UniformAllocator(_Ranked):
    """The same share of every channel group; blocks stay."""

    def _at(self, importance: Importance, level: float) -> np.ndarray:
        return np.array([self._round(g, 1 if self.depth[g] else level * full) for g, full in enumerate(self.full)])


ALLOCATORS: dict[str, type[Allocator]] = {"global": GlobalAllocator, "uniform": UniformAllocator}
"""By name; those of `knapsack.py` and `latency_allocator.py` register themselves."""
