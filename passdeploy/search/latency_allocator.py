"""Least loss for the milliseconds: width and depth together, on the latency model.

Three searches, each weak where another is strong: a greedy descent on loss per saved millisecond (sees the latency as
it is, steps and all, but never takes a move back), the knapsack (takes all decisions at once, but on a linearised
latency), and exchanges around the better of both (one group up, another one down).
"""

from __future__ import annotations

import numpy as np

from passdeploy.search.allocator import ALLOCATORS, Allocation, Importance
from passdeploy.search.knapsack import KnapsackAllocator

PARTNERS = 48
"""Most promising moves in each direction whose pairs are tried."""


class LatencyAllocator(KnapsackAllocator):
    """The structure of least summed importance within the latency, as far as it can be found."""

    LOOKAHEAD = 3
    """Grid levels a single move may go: a staircase has flat treads."""

    def narrow(
        self, importance: Importance, target_ms: float, start: np.ndarray, blocks: bool = False
    ) -> Allocation | None:
        """Downwards from `start` until the target is met, then exchanges: quick where `start` was once a solution."""
        cost = self.tables(importance)
        # Widths inside a removed block mean nothing; should it come back, it comes back whole.
        start = np.where(self.alive(start[None])[0], start, self.widest())
        widths = self._greedy(cost, target_ms, start, blocks)
        if widths is None:
            return None
        widths = self._exchange(widths, cost, target_ms, blocks)
        return self._allocation(importance, widths, self._price(widths, cost, blocks))

    def _price(self, widths: np.ndarray, cost: np.ndarray, blocks: bool) -> float:
        """Loss per millisecond of what would come back first; 0 when everything is there."""
        higher = self._moves(widths, True, blocks, self.LOOKAHEAD)
        if not len(higher):
            return 0.0
        spent = self.predict(higher) - float(self.predict(widths[None])[0])
        gained = float(self.losses(widths[None], cost)[0]) - self.losses(higher, cost)
        rates = np.where(spent > 1e-6 * self.dense_ms, gained / np.maximum(spent, 1e-12), 0.0)
        return max(float(rates.max()), 0.0)

    def _widths(self, importance: Importance, target_ms: float) -> tuple[np.ndarray | None, float]:
        cost = self.tables(importance)
        widths = self._greedy(cost, target_ms, self.widest(), blocks=True)
        if widths is not None and (widths == self.widest()).all():
            return widths, 0.0
        if widths is None and float(self.predict(self.fastest()[None])[0]) > target_ms:
            return None, 0.0
        # Where no single move makes it faster, as of two branches that take equally long, several may together.
        packed, _ = super()._widths(importance, target_ms)
        starts = [start for start in (widths, packed) if start is not None] or [self.fastest()]
        found = [self._exchange(start, cost, target_ms, blocks=True) for start in starts]
        best = min(found, key=lambda row: float(self.losses(row[None], cost)[0]))
        return best, self._price(best, cost, blocks=True)

    def _moves(self, widths: np.ndarray, up: bool, blocks: bool, reach: int) -> np.ndarray:
        """All rows in which one group that matters is up to `reach` levels of its grid higher (lower)."""
        alive = self.alive(widths[None])[0]
        moves = []
        for g, grid in enumerate(self.grids):
            if alive[g] and (blocks or not self.depth[g]):
                levels = grid[grid > widths[g]] if up else grid[grid < widths[g]][::-1]
                moves += [(g, int(level)) for level in levels[:reach]]
        rows = np.repeat(widths[None], len(moves), axis=0)
        for row, (g, level) in enumerate(moves):
            rows[row, g] = level
        return rows

    def _greedy(self, cost: np.ndarray, target_ms: float, widths: np.ndarray, blocks: bool) -> np.ndarray | None:
        """Downwards where loss per saved millisecond is lowest; None when the target can't be reached."""
        now, loss = float(self.predict(widths[None])[0]), float(self.losses(widths[None], cost)[0])
        while now > target_ms:
            for reach in (self.LOOKAHEAD, int(self.full.max())):
                candidates = self._moves(widths, False, blocks, reach)
                if not len(candidates):
                    continue
                latency = self.predict(candidates)
                # What is saved below the target is worth nothing.
                saved = now - np.maximum(latency, target_ms)
                useful = (now - latency) > 1e-6 * self.dense_ms
                if useful.any():
                    break
            else:
                return None
            losses = self.losses(candidates, cost)
            rate = np.where(useful, (losses - loss) / np.maximum(saved, 1e-12), np.inf)
            best = int(np.argmin(rate))
            widths, now, loss = candidates[best], float(latency[best]), float(losses[best])
        return widths

    def _exchange(self, widths: np.ndarray, cost: np.ndarray, target_ms: float, blocks: bool) -> np.ndarray:
        """Raises groups while the target allows, and where it does not, lowers another one for it."""
        loss = float(self.losses(widths[None], cost)[0])
        for _ in range(4 * len(self.grids)):
            higher = self._moves(widths, True, blocks, self.LOOKAHEAD)
            if not len(higher):
                break
            lower = self._moves(widths, False, blocks, self.LOOKAHEAD)
            best_up = higher[np.argsort(self.losses(higher, cost), kind="stable")[:PARTNERS]]
            best_down = lower[np.argsort(self.losses(lower, cost), kind="stable")[:PARTNERS]]
            pairs = best_up[:, None] + best_down[None] - widths
            apart = ~((best_up[:, None] != widths) & (best_down[None] != widths)).any(2)
            candidates = np.concatenate([higher, pairs[apart]])
            losses = self.losses(candidates, cost)
            better = losses < loss - 1e-12
            candidates, losses = candidates[better], losses[better]
            fits = self.predict(candidates) <= target_ms if len(candidates) else np.zeros(0, dtype=bool)
            if not fits.any():
                break
            best = int(np.argmin(np.where(fits, losses, np.inf)))
            widths, loss = candidates[best], float(losses[best])
        return widths


ALLOCATORS["latency"] = LatencyAllocator
