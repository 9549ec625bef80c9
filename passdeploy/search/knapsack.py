"""Latency as a knapsack: keep the most importance that the budget pays for.

Every item of the knapsack is a channel group, or a block with the groups inside it; its options are the widths it may
take and, where depth counts, its absence (Shen et al., HALP, arXiv 2110.10811; Sun et al., MDP, arXiv 2504.02168).
Latency is not a sum over items: it is linearised at the last solution and solved again, as both do round by round.
"""

from __future__ import annotations

import itertools

import numpy as np

from passdeploy.search.allocator import ALLOCATORS, Allocator, Importance

BUCKETS = 2000
"""Resolution of the latency axis."""
ROUNDS = 16
COMBINATIONS = 64
"""Joint widths of a block's inner groups that are tried at most."""

Option = dict[int, int]


class KnapsackAllocator(Allocator):
    """Multiple-choice knapsack by dynamic programming; whole blocks are options where their grid allows it."""

    def items(self) -> list[list[Option]]:
        """Per item its options, as widths of the groups that it decides."""
        inside: set[int] = set()
        items: list[list[Option]] = []
        for d in np.flatnonzero(self.depth):
            inner = [int(g) for g in np.flatnonzero(self.gates[d]) if not self.depth[g]]
            nested = bool((self.gates[:, d]).any())
            if nested or len(self.grids[d]) == 1 or inside & set(inner):
                continue  # stays
            inside |= set(inner)
            kept = [{int(d): 1, **widths} for widths in self._joint(inner)]
            items.append([{int(d): 0}, *kept])
        for g, grid in enumerate(self.grids):
            if not self.depth[g] and g not in inside:
                items.append([{g: int(width)} for width in grid])
        return items

    def _joint(self, inner: list[int]) -> list[Option]:
        """Widths of several groups at once: all combinations where they are few.

        Where they are not, all combinations of fewer levels of each grid, evenly spread, and the same share of each.
        """
        grids = [self.grids[g] for g in inner]
        most = levels = max((len(grid) for grid in grids), default=0)
        while np.prod([min(levels, len(grid)) for grid in grids], dtype=float) > COMBINATIONS:
            levels -= 1
        rows = list(itertools.product(*(_spread(grid, levels) for grid in grids)))
        if levels < most:
            rows += zip(*(grid[np.linspace(0, len(grid) - 1, most).round().astype(int)] for grid in grids), strict=True)
        return [dict(zip(inner, map(int, row), strict=True)) for row in dict.fromkeys(rows)]

    def _rows(self, reference: np.ndarray, options: list[Option]) -> np.ndarray:
        rows = np.repeat(reference[None], len(options), axis=0)
        for row, option in enumerate(options):
            for g, width in option.items():
                rows[row, g] = width
        return rows

    def _pack(
        self, items: list[list[Option]], losses: list[np.ndarray], reference: np.ndarray, target_ms: float
    ) -> np.ndarray:
        """Widths of least loss whose latency, linearised at `reference`, is at most `target_ms`."""
        base = float(self.predict(reference[None])[0])
        changes = [self.predict(self._rows(reference, options)) - base for options in items]
        room = target_ms - base - sum(float(change.min()) for change in changes)
        if room <= 0:
            chosen = [int(change.argmin()) for change in changes]
        else:
            chosen = _multiple_choice(losses, [(change - change.min()) / room * BUCKETS for change in changes])
        widths = self.widest()  # a removed block's: should it come back, it comes back as wide as it may be
        for options, index in zip(items, chosen, strict=True):
            for g, width in options[index].items():
                widths[g] = width
        return widths

    def _widths(self, importance: Importance, target_ms: float) -> tuple[np.ndarray | None, float]:
        cost = self.tables(importance)
        items = self.items()
        losses = [self.losses(self._rows(self.full, options), cost) for options in items]
        best, least = None, np.inf
        reference, aim = self.widest(), target_ms
        for _ in range(ROUNDS):
            widths = self._pack(items, losses, reference, aim)
            now = float(self.predict(widths[None])[0])
            loss = float(self.losses(widths[None], cost)[0])
            if now <= target_ms and loss < least:
                best, least = widths, loss
            # The linearisation is wrong by what the solution shows: ask for that much more or less.
            aim *= float(np.clip(target_ms / now, 0.8, 1.25))
            reference = widths
        lowest = self.fastest()
        if best is None and self.predict(lowest[None])[0] <= target_ms:
            best = lowest
        return best, 0.0


def _spread(grid: np.ndarray, levels: int) -> np.ndarray:
    """So many of the grid's widths, evenly spread, its ends among them; the widest where it is one."""
    if levels >= len(grid):
        return grid
    return grid[np.linspace(len(grid) - 1, 0, levels).round().astype(int)][::-1]


def _multiple_choice(losses: list[np.ndarray], weights: list[np.ndarray]) -> list[int]:
    """One option of every item: least summed loss with summed weights of at most `BUCKETS` (weights rounded up)."""
    totals = np.zeros(BUCKETS + 1)
    choices = []
    for loss, weight in zip(losses, weights, strict=True):
        best = np.full(BUCKETS + 1, np.inf)
        choice = np.zeros(BUCKETS + 1, dtype=int)
        # where next to no room is left, weights are larger than any integer
        sizes = np.ceil(np.minimum(weight, BUCKETS + 1) - 1e-9).astype(int)
        for option, (cost, size) in enumerate(zip(loss, sizes, strict=True)):
            if size > BUCKETS:
                continue
            moved = np.full(BUCKETS + 1, np.inf)
            moved[size:] = totals[: BUCKETS + 1 - size] + cost
            better = moved < best
            best[better], choice[better] = moved[better], option
        totals = best
        choices.append((choice, sizes))
    bucket = int(np.argmin(totals))
    chosen = []
    for choice, sizes in reversed(choices):
        option = int(choice[bucket])
        chosen.append(option)
        bucket -= int(sizes[option])
    return chosen[::-1]


ALLOCATORS["knapsack"] = KnapsackAllocator
