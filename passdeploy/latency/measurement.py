"""What was measured: one engine's latency, and engines that took turns, in one process or in several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from passdeploy.latency.stats import Ratio, median_ratio, percentile

Verdict = Literal["faster", "slower", "same", "inconclusive"]
MAX_SAMPLES = 2000
"""Samples of a measurement that are kept."""
RESOLUTION = 0.02
"""Two loads of one and the same engine file differ by up to this much (where its buffers happen to lie in memory), so
that nothing below it is ever called a difference."""


@dataclass(frozen=True)
class Measurement:
    """The latency of one engine, in milliseconds.

    Attributes:
        p50: Nearest rank over the calls of all undisturbed blocks; None where there are too few samples to say.
        p90: Likewise.
        p99: Likewise.
        mean: Over the same calls.
        n: Number of those calls.
        spread: Relative spread between the medians of all blocks, disturbed or not: from the 10th to the 90th
            percentile, scaled so that it is the standard deviation of normal noise.
        blocks: Number of blocks.
        disturbed: How many of them were left out.
        samples: The calls' latencies, thinned out evenly to at most 2000.
        floor: The fastest 5 % of all calls take at most this: what the engine needs when nothing else runs. On a busy
            machine it repeats to a fraction of a percent where medians do not; it steers, it is never quoted.
        enqueue: Median of what the host took to enqueue a call; None where nothing is enqueued (a CPU).
    """

    p50: float | None
    p90: float | None
    p99: float | None
    mean: float
    n: int
    spread: float
    blocks: int
    disturbed: int
    samples: tuple[float, ...]
    floor: float = 0.0
    enqueue: float | None = None

    def at(self, q: float) -> float | None:
        """The latency at a percentile; None where there are too few samples to say."""
        named = {50: self.p50, 90: self.p90, 99: self.p99}
        return named[int(q)] if q in named else percentile(self.samples, q)

    @property
    def noisy(self) -> bool:
        """Whether the machine was too disturbed for the numbers to be trusted without a second look."""
        return self.disturbed > 0.25 * self.blocks or self.spread > 0.1

    def to_json(self, *, samples: bool = False) -> dict[str, Any]:
        """JSON-able; the samples only when asked for."""
        data: dict[str, Any] = {k: getattr(self, k) for k in self.__dataclass_fields__ if k != "samples"}
        if samples:
            data["samples"] = [round(s, 6) for s in self.samples]
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Measurement:
        known = {k: data[k] for k in cls.__dataclass_fields__ if k in data and k != "samples"}
        return cls(**known, samples=tuple(data.get("samples", ())))


@dataclass(frozen=True)
class Comparison:
    """Engines that were measured side by side.

    Attributes:
        measurements: By name, in the order in which they took turns.
        pairs: By name, round by round: the reference's block median over the engine's (above 1: faster than the
            reference).
        reference: The name of the first.
    """

    measurements: Mapping[str, Measurement]
    pairs: Mapping[str, tuple[float, ...]]
    reference: str

    def ratio(self, name: str, confidence: float = 0.95) -> Ratio:
        """How many times as fast as the reference."""
        return median_ratio(self.pairs[name], confidence)

    def to_json(self) -> dict[str, Any]:
        """JSON-able, samples and all."""
        measurements = {name: measurement.to_json(samples=True) for name, measurement in self.measurements.items()}
        return {"measurements": measurements, "pairs": dict(self.pairs), "reference": self.reference}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Comparison:
        measurements = {name: Measurement.from_json(each) for name, each in data["measurements"].items()}
        return cls(measurements, {name: tuple(pairs) for name, pairs in data["pairs"].items()}, data["reference"])

    def verdict(self, name: str, margin: float = 0.0) -> Verdict:
        """Whether `name` is slower (or faster) than the reference by more than `margin` (0.05 = 5 %).

        ``same`` says that it is neither, ``inconclusive`` that the interval (99 %) does not tell.
        """
        margin = max(margin, RESOLUTION)
        time_ratio = self.ratio(name, 0.99).inverse()
        if time_ratio.low > 1 + margin:
            return "slower"
        if time_ratio.high < 1 - margin:
            return "faster"
        if time_ratio.low >= 1 - margin and time_ratio.high <= 1 + margin:
            return "same"
        return "inconclusive"

    def not_slower(self, name: str, margin: float) -> bool | None:
        """For ``--fail-if-slower``: False when slower than the reference by more than `margin`, None: can't tell."""
        margin = max(margin, RESOLUTION)
        time_ratio = self.ratio(name, 0.99).inverse()
        if time_ratio.low > 1 + margin:
            return False
        return True if time_ratio.high <= 1 + margin else None


def pooled(comparisons: Sequence[Comparison]) -> Comparison:
    """Comparisons of the same engines, each by another process, as one.

    A process is one sample: its ratio is what its blocks agree on, and its buffers lie where they lie. So the pairs are
    one a process, and the interval of their median says what the next process may find. With six it reaches from the
    lowest to the highest (96.9 %).
    """
    first = comparisons[0]
    return Comparison(
        measurements={name: _pooled([each.measurements[name] for each in comparisons]) for name in first.measurements},
        pairs={name: tuple(each.ratio(name).value for each in comparisons) for name in first.pairs},
        reference=first.reference,
    )


def kept_samples(calls: np.ndarray) -> tuple[float, ...]:
    """All calls, or `MAX_SAMPLES` of them, evenly spaced, where there are more."""
    if len(calls) > MAX_SAMPLES:
        calls = calls[np.linspace(0, len(calls) - 1, MAX_SAMPLES).round().astype(int)]
    return tuple(calls.tolist())


def _pooled(parts: Sequence[Measurement]) -> Measurement:
    samples = np.concatenate([part.samples for part in parts])
    calls = sum(part.n for part in parts)
    enqueued = [part.enqueue for part in parts if part.enqueue is not None]
    return Measurement(
        p50=percentile(samples, 50),
        p90=percentile(samples, 90),
        p99=percentile(samples, 99),
        mean=sum(part.mean * part.n for part in parts) / calls,
        n=calls,
        spread=float(np.median([part.spread for part in parts])),
        blocks=sum(part.blocks for part in parts),
        disturbed=sum(part.disturbed for part in parts),
        samples=kept_samples(samples),
        floor=min(part.floor for part in parts),
        enqueue=float(np.median(enqueued)) if enqueued else None,
    )
