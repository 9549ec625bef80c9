"""Order statistics that make no assumption about the noise: a busy machine's is neither normal nor symmetric."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

CONFIDENCE = 0.99


@cache
def min_samples(percentile: float, confidence: float = CONFIDENCE) -> int:
    """The fewest samples that say anything about a percentile (MLPerf Inference's early-stopping rule).

    The rule asks how many samples n are needed so that seeing at most one of them above the percentile would have a
    probability of at most ``1 - confidence`` if it were truly exceeded more often: 11 for p50, 64 for p90, 662 for p99
    (MLPerf's own figures for SingleStream and MultiStream are the latter two).
    Source: https://github.com/mlcommons/inference_policies, "early stopping criterion".
    """
    p = percentile / 100
    n = 2
    while p**n + n * (1 - p) * p ** (n - 1) > 1 - confidence:
        n += 1
    return n


def percentile(samples: Sequence[float] | np.ndarray, q: float) -> float | None:
    """Nearest-rank percentile, or None where there are too few samples to say."""
    if len(samples) < min_samples(q):
        return None
    ordered = np.sort(np.asarray(samples, dtype=float))
    return float(ordered[max(math.ceil(q / 100 * len(ordered)), 1) - 1])


def spread(values: Sequence[float] | np.ndarray) -> float:
    """Robust relative spread: 1.4826 times the median absolute deviation, over the median (0.01 = 1 %)."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return 0.0
    centre = float(np.median(values))
    return float(1.4826 * np.median(np.abs(values - centre)) / centre) if centre > 0 else 0.0


def decile_spread(values: Sequence[float] | np.ndarray) -> float:
    """Relative spread between the 10th and the 90th percentile, scaled to the standard deviation of normal noise.

    Unlike `spread` it sees a machine that is disturbed for a third of the time.
    """
    low, middle, high = np.quantile(np.asarray(values, dtype=float), (0.1, 0.5, 0.9))
    return float((high - low) / 2.563 / middle) if middle > 0 else 0.0


@cache
def median_ranks(n: int, confidence: float) -> tuple[int, int] | None:
    """Zero-based ranks of the order statistics that enclose the median with `confidence`; None if n is too small."""
    tail, rank = 0.0, -1
    for k in range(n // 2):
        tail += math.comb(n, k) / 2**n
        if tail > (1 - confidence) / 2:
            break
        rank = k
    return None if rank < 0 else (rank, n - 1 - rank)


@dataclass(frozen=True)
class Ratio:
    """A ratio with its interval.

    Attributes:
        value: Median over block pairs.
        low: Lower end of the interval; 0 where there are too few pairs to say.
        high: Upper end; infinite where there are too few pairs to say.
        n: Number of pairs.
        confidence: Of the interval.
    """

    value: float
    low: float
    high: float
    n: int
    confidence: float = 0.95

    def inverse(self) -> Ratio:
        """The ratio the other way round."""
        return Ratio(1 / self.value, 1 / self.high, 1 / self.low if self.low > 0 else math.inf, self.n, self.confidence)

    @property
    def reach(self) -> float:
        """How far the interval reaches to either side, as a fraction of the value; infinite where an end is open."""
        return max(1 - self.low / self.value, self.high / self.value - 1) if self.low > 0 else math.inf

    def to_json(self) -> dict[str, Any]:
        """JSON-able; an unknown end is None."""
        return {
            "value": self.value,
            "low": self.low if self.low > 0 else None,
            "high": self.high if math.isfinite(self.high) else None,
            "n": self.n,
            "confidence": self.confidence,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Ratio:
        low, high = data["low"], data["high"]
        return cls(data["value"], 0.0 if low is None else low, math.inf if high is None else high, data["n"],
                   data["confidence"])  # fmt: skip


def median_ratio(pairs: Sequence[float] | np.ndarray, confidence: float = 0.95) -> Ratio:
    """Median of the pairs' ratios with its distribution-free (order-statistic) interval."""
    ordered = np.sort(np.asarray(pairs, dtype=float))
    ranks = median_ranks(len(ordered), confidence)
    low, high = (0.0, math.inf) if ranks is None else (float(ordered[ranks[0]]), float(ordered[ranks[1]]))
    return Ratio(float(np.median(ordered)), low, high, len(ordered), confidence)
