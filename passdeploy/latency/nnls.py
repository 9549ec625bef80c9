"""Least squares whose coefficients can't be negative: no operator takes less than no time."""

from __future__ import annotations

import numpy as np


def nnls(gram: np.ndarray, target: np.ndarray, rounds: int = 10) -> np.ndarray:
    """Minimises ``x' gram x / 2 - target' x`` over x >= 0 with the active-set method.

    Args:
        gram: ``A'A`` plus whatever regularises it, positive definite; shape (n, n).
        target: ``A'b``; shape (n,).
        rounds: Gives up after this many passes per coefficient (it needs less than two; rounding could make it cycle).

    Source: Bro and de Jong, "A fast non-negativity-constrained least squares algorithm", J. Chemometrics 11, 1997.
    """
    n = len(target)
    x = np.zeros(n)
    free = np.zeros(n, bool)
    gradient = target.copy()
    tolerance = 1e-10 * max(float(np.abs(target).max()), 1e-300)
    for _ in range(rounds * n):
        candidates = np.where(free, -np.inf, gradient)
        best = int(candidates.argmax())
        if candidates[best] <= tolerance:
            break
        free[best] = True
        while True:
            index = np.flatnonzero(free)
            trial = np.zeros(n)
            trial[index] = np.linalg.solve(gram[np.ix_(index, index)], target[index])
            if len(index) == 0 or trial[index].min() > 0:
                break
            # as far towards the trial point as stays feasible; what hits zero leaves the free set
            falling = index[trial[index] <= 0]
            step = float(np.min(x[falling] / np.maximum(x[falling] - trial[falling], 1e-300)))
            x = x + step * (trial - x)
            leaving = falling[x[falling] <= 1e-12 * max(float(x.max()), 1e-300)]
            if len(leaving) == 0:
                leaving = falling[:1]
            x[leaving] = 0
            free[leaving] = False
        x = trial
        gradient = target - gram @ x
    return x
