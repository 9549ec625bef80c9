"""The regression behind the latency model: a non-negative ridge on features of the operators, robust to outliers.

Coefficients are prices, so none is below zero: work, memory traffic and launches only ever add to a latency. What a
family of operators pays is what all pay plus something of its own, both of which the ridge keeps small: of what a few
structures hardly tell (odd widths of one family), what others pay is the better guess.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from passdeploy.latency.features import CACHES, TERMS, Features
from passdeploy.latency.nnls import nnls

if TYPE_CHECKING:
    from passdeploy.groups import Operator

RIDGES = (1e-5, 1e-4, 1e-3, 1e-2)


@dataclass(frozen=True)
class Fit:
    """Coefficients of the base model, as shares of the dense engine's latency.

    Attributes:
        step: Width step of the hardware.
        ridge: Strength of the regularisation.
        families: What a family of operators pays per unit of every term [families, terms].
        caches: Per byte of weights that each of `CACHES` does not hold.
        constant: Paid by every structure.
    """

    step: int
    ridge: float
    families: np.ndarray
    caches: np.ndarray
    constant: float


def _columns(features: Features, w: np.ndarray) -> np.ndarray:
    """Design matrix [n, (families + 1) * terms + caches + 1]; the last "family" are all of them."""
    terms = features.terms(w)
    count = len(features.families)
    members = np.zeros((count + 1, len(features.family)))
    members[features.family, np.arange(len(features.family))] = 1
    members[count] = 1
    by_family = np.einsum("nok,fo->nfk", terms, members).reshape(len(terms), -1)
    weights = terms[..., TERMS.index("weights")].sum(1)
    spilled = np.stack([features.spilled(weights, cache) for cache in CACHES], axis=1)
    return np.concatenate([by_family, spilled, np.ones((len(terms), 1))], axis=1)


def _solve(columns: np.ndarray, ratios: np.ndarray, weights: np.ndarray, ridge: float) -> np.ndarray:
    """Non-negative ridge on the relative error; columns are scaled to a largest value of 1 first.

    Not to a mean of 1: what few structures have (odd widths) would come out so large where they have it that the ridge
    hardly bounds what it may cost.
    """
    scale = columns.max(axis=0)
    used = scale > 0
    a = columns[:, used] / scale[used] / ratios[:, None] * np.sqrt(weights)[:, None]
    gram = a.T @ a / weights.sum()
    gram[np.diag_indices_from(gram)] += ridge
    solution = np.zeros(columns.shape[1])
    solution[used] = nnls(gram, a.T @ np.sqrt(weights) / weights.sum()) / scale[used]
    return solution


def _robust(columns: np.ndarray, ratios: np.ndarray, weights: np.ndarray, ridge: float) -> np.ndarray:
    """Weights under which what lies far off the fit counts hardly: a disturbed measurement is no news."""
    trusted = weights
    for _ in range(2):
        error = np.abs(columns @ _solve(columns, ratios, trusted, ridge) / ratios - 1)
        limit = max(2 * 1.4826 * float(np.median(error)), 1e-4)
        # Squared: with Huber's own weights, a far one pulls as much as one at the limit, however far it is.
        trusted = weights * np.minimum(1, limit / np.maximum(error, 1e-12)) ** 2
    return trusted


def folds(n: int, k: int = 5) -> np.ndarray:
    """Fold of each sample: a fixed shuffle, so that a fit depends on nothing but its data."""
    return np.random.default_rng(n).permutation(n) % k


@dataclass(frozen=True)
class Selection:
    """What cross-validation chose.

    Attributes:
        step: Width step of the hardware.
        ridge: Strength of the regularisation.
        errors: Relative error of each structure when it was left out of the fit [n].
    """

    step: int
    ridge: float
    errors: np.ndarray


def cross_validate(
    operators: Sequence[Operator],
    units: Sequence[int],
    widths: np.ndarray,
    ratios: np.ndarray,
    trust: np.ndarray,
    steps: Sequence[int],
    bytes_per_weight: int,
) -> Selection:
    """Chooses step and ridge by 5-fold cross-validation; arguments as for `LatencyModel.fit`, `trust` its weights."""
    best: tuple[float, Selection] | None = None
    fold = folds(len(ratios))
    for step in sorted(set(steps)):
        columns = _columns(Features(operators, units, step, bytes_per_weight), widths)
        parts = [fold != k for k in range(fold.max() + 1)]
        # A structure that is left out has no say in how far the others are trusted.
        robust = [_robust(columns[part], ratios[part], trust[part], RIDGES[0]) for part in parts]
        for ridge in RIDGES:
            predicted = np.empty(len(ratios))
            for train, weights in zip(parts, robust, strict=True):
                predicted[~train] = columns[~train] @ _solve(columns[train], ratios[train], weights, ridge)
            errors = np.abs(predicted / ratios - 1)
            score = float(trust @ errors / trust.sum())
            if best is None or score < best[0] - 1e-4:
                best = (score, Selection(step, ridge, errors))
    assert best is not None
    return best[1]


def fit_base(
    features: Features, widths: np.ndarray, ratios: np.ndarray, trust: np.ndarray, step: int, ridge: float
) -> Fit:
    """Fits the base model to all structures, at a chosen step and ridge."""
    columns = _columns(features, widths)
    solution = _solve(columns, ratios, _robust(columns, ratios, trust, RIDGES[0]), ridge)
    split = (len(features.families) + 1) * len(TERMS)
    *own, shared = solution[:split].reshape(-1, len(TERMS))
    return Fit(step, ridge, np.array(own) + shared, solution[split : split + len(CACHES)], float(solution[-1]))
