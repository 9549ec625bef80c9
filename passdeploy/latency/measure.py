"""How latency is measured: blocks of repeats, interleaved with what they are compared to.

A single number from a busy machine is worth nothing, and an average hides what went wrong. So calls come in blocks; a
block that stands out from the others of its kind was disturbed: it is marked, repeated, and left out of the
percentiles. Two engines are compared only by alternating their blocks in one process: whatever slows the machine down
then hits both, and the ratio of neighbouring blocks does not see it.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from passdeploy.latency.measurement import Comparison, Measurement, kept_samples
from passdeploy.latency.stats import decile_spread, median_ratio, min_samples, percentile

Clock = Callable[[], float]
FLOOR = 0.05
LEAST = 8
"""Rounds at least, however long they take: fewer have no 99 % interval."""
PATIENCE = 10
"""How many times `Settings.max_s` undisturbed rounds, and the samples of a percentile, are waited for: without them
there is no answer."""


class Timed(Protocol):
    """Whatever can be measured.

    An object may also offer ``block(seconds, calls) -> list of seconds per call`` when it can time itself better than
    the caller can (GPU events, a child process), the first call left out as below, and then say in ``enqueued`` how
    many seconds the host took to enqueue each call of its last block.
    """

    def call(self) -> None:
        """One inference; returns when it is done."""


@dataclass(frozen=True)
class Settings:
    """How long and how often.

    Attributes:
        pairs: Undisturbed rounds (one block of everything) to reach.
        block_s: Shortest block.
        block_calls: Fewest calls of a block.
        warmup_s: Shortest warm-up of each engine; it goes on until block medians stop falling, at most ten times as
            long.
        disturbed: A block is disturbed when its median is this fraction above the median block of its kind (or beyond
            four robust standard deviations, whichever is more).
        retries: Rounds that may be repeated, as a fraction of `pairs`.
        precise: Rounds are added until every ratio's 95 % interval reaches no further than this to either side; None:
            never.
        grow: How many times `pairs` rounds there may be for that.
        percentiles: Percentiles that are needed: rounds are added until there are samples enough.
        processes: In how many processes the same is measured: each needs that part of the samples only (`pooled`).
        max_s: No more rounds after this long, but for `LEAST` undisturbed ones; ten times as long at most while those,
            or the samples of a percentile, are lacking.
    """

    pairs: int = 40
    block_s: float = 0.02
    block_calls: int = 3
    warmup_s: float = 0.05
    disturbed: float = 0.1
    retries: float = 0.5
    precise: float | None = 0.012
    grow: float = 4.0
    percentiles: tuple[float, ...] = (50.0,)
    processes: int = 1
    max_s: float = 60.0


BENCH = Settings()
QUICK = Settings(pairs=12, block_s=0.01, warmup_s=0.02, precise=None)


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """The garbage collector would strike at random, and only some calls."""
    was = gc.isenabled()
    gc.collect(1)  # not the oldest generation: after an ONNX export that takes half a second, each time
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _block(runner: Timed, seconds: float, calls: int, clock: Clock) -> list[float]:
    """Seconds of each call of one block; the first call of a block finds cold caches and is not counted."""
    own = getattr(runner, "block", None)
    if own is not None:
        return list(own(seconds, calls))
    call = runner.call
    call()
    times: list[float] = []
    start = before = clock()
    while len(times) < calls or before - start < seconds:
        call()
        after = clock()
        times.append(after - before)
        before = after
    return times


def warm_up(runner: Timed, settings: Settings = BENCH, clock: Clock = time.perf_counter) -> None:
    """Calls until the block medians have stopped falling."""
    start, best = clock(), math.inf
    steady = 0
    while steady < 2 or clock() - start < settings.warmup_s:
        median = float(np.median(_block(runner, settings.block_s / 4, 2, clock)))
        steady = steady + 1 if median > 0.98 * best else 0
        best = min(best, median)
        if clock() - start > 10 * settings.warmup_s:
            return


def _quiet_spread(values: np.ndarray) -> float:
    """Relative standard deviation seen from below the median: disturbance only ever adds time."""
    low, middle = np.quantile(values, (0.1, 0.5))
    return float((middle - low) / 1.2816 / middle)


def _disturbed(medians: Sequence[float], settings: Settings) -> np.ndarray:
    values = np.asarray(medians)
    limit = float(np.median(values)) * (1 + max(settings.disturbed, 4 * _quiet_spread(values)))
    disturbed: np.ndarray = values > limit
    return disturbed


def _summary(blocks: Sequence[list[float]], disturbed: np.ndarray, enqueued: Sequence[float]) -> Measurement:
    calls = 1e3 * np.concatenate([b for b, bad in zip(blocks, disturbed, strict=True) if not bad])
    return Measurement(
        p50=percentile(calls, 50),
        p90=percentile(calls, 90),
        p99=percentile(calls, 99),
        mean=float(calls.mean()),
        n=len(calls),
        spread=decile_spread([float(np.median(b)) for b in blocks]),
        blocks=len(blocks),
        disturbed=int(disturbed.sum()),
        samples=kept_samples(calls),
        floor=1e3 * float(np.quantile(np.concatenate(blocks), FLOOR)),
        enqueue=1e3 * float(np.median(enqueued)) if len(enqueued) else None,
    )


def interleave(
    runners: Mapping[str, Timed],
    settings: Settings = BENCH,
    *,
    clock: Clock = time.perf_counter,
    warm: bool = True,
    progress: Callable[[int], None] | None = None,
) -> Comparison:
    """Measures engines by taking turns, block by block (A B A B ...).

    Args:
        runners: By name; the first is the reference of the ratios.
        settings: How long and how often.
        clock: Seconds, for tests.
        warm: Whether to warm up first.
        progress: Called between rounds with the number of those that are done.

    A round in which any block was disturbed is repeated (up to `Settings.retries`); the ratios are over the undisturbed
    rounds, or over all of them when fewer than `LEAST` were left, or than half of those asked for or that time allowed.
    """
    names = list(runners)
    blocks: dict[str, list[list[float]]] = {name: [] for name in names}
    medians: dict[str, list[float]] = {name: [] for name in names}
    enqueued: dict[str, list[float]] = {name: [] for name in names}
    with no_garbage_collection():
        if warm:
            for runner in runners.values():
                warm_up(runner, settings, clock)
        start = clock()
        least = min(LEAST, settings.pairs)
        needed = math.ceil(max((min_samples(q) for q in settings.percentiles), default=0) / settings.processes)
        while True:
            for name in names:
                block = _block(runners[name], settings.block_s, settings.block_calls, clock)
                blocks[name].append(block)
                medians[name].append(float(np.median(block)))
                enqueued[name].extend(getattr(runners[name], "enqueued", ()))
            rounds = len(medians[names[0]])
            if progress is not None:
                progress(rounds)
            if rounds < settings.pairs and (rounds < LEAST or clock() - start <= settings.max_s):
                continue
            bad = {name: _disturbed(medians[name], settings) for name in names}
            clean = ~np.logical_or.reduce(list(bad.values()))
            samples = min(sum(len(b) for b, d in zip(blocks[n], bad[n], strict=True) if not d) for n in names)
            usable = clean.sum() >= max(least, min(rounds, settings.pairs) / 2)
            pairs = _pairs(medians, clean if usable else np.ones_like(clean))
            retried_out = rounds >= settings.pairs * (1 + settings.retries)
            enough = samples >= needed and (clean.sum() >= settings.pairs or retried_out)
            vague = rounds < settings.grow * settings.pairs and not _precise(pairs, settings.precise)
            patience = settings.max_s if samples >= needed and clean.sum() >= least else PATIENCE * settings.max_s
            if (enough and not vague) or clock() - start > patience:
                break
    return Comparison(
        measurements={name: _summary(blocks[name], bad[name], enqueued[name]) for name in names},
        pairs=pairs,
        reference=names[0],
    )


def _pairs(medians: Mapping[str, Sequence[float]], used: np.ndarray) -> dict[str, tuple[float, ...]]:
    """By name, the reference's (the first one's) block median over the block median of the same round."""
    reference = np.asarray(next(iter(medians.values())))[used]
    return {name: tuple((reference / np.asarray(values)[used]).tolist()) for name, values in medians.items()}


def _precise(pairs: Mapping[str, Sequence[float]], limit: float | None) -> bool:
    if limit is None:
        return True
    ratios = [median_ratio(values) for values in list(pairs.values())[1:]]
    return all(r.high <= r.value * (1 + limit) and r.low >= r.value * (1 - limit) for r in ratios)
