"""Measuring many structures quickly, for fitting the latency model to.

What is quoted is a median over undisturbed blocks (`passdeploy.latency.measure`). What a model is fitted to must
repeat to a fraction of a percent in a fraction of a second, on whatever machine it is, or no fit can be better than
the noise. So it is the floor: the time that the fastest calls take, of the structure and, in turns with it, of the
dense engine. On a quiet machine it is the median within a percent or two; on a busy one (2 cores, load 5) it was
found to repeat within 0.2 % where medians repeated within 4 %, for calls of a millisecond.

A call that lasts longer than a scheduler's time slice never runs undisturbed on a busy machine. An engine that
computes on one CPU thread is therefore timed by the CPU's clock for this process, which stops while something else
runs (repeats within 3 % instead of 28 % at load 7, for calls of 7 ms).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from passdeploy.latency.measure import FLOOR, Clock, Settings, Timed, no_garbage_collection, warm_up

LEAST_ROUNDS = 3
QUIET = 0.02
"""A sample is quiet when the dense engine's floor in it is within this of what is usual."""
TROUBLED = 0.2
"""How far above the usual its floor lies in a sample that counts half."""


def usual(floors: Sequence[float]) -> float:
    """The dense engine's floor on this machine as it mostly is: the lower quartile of those in all samples.

    Not the lowest: where neighbours share the cache, one lucky sample would make all others look disturbed.
    """
    return float(np.quantile(floors, 0.25))


def trust(floors: Sequence[float]) -> np.ndarray:
    """Weight of each sample [n], by its floor of the dense engine: 1, and less the slower the machine was."""
    above = np.maximum(np.asarray(floors) / usual(floors) - 1, 0)
    weights: np.ndarray = 1 / (1 + (above / TROUBLED) ** 2)
    return weights


class Sampler:
    """Measures thin engines beside one dense engine.

    Args:
        dense: The dense engine; stays loaded.
        one_thread: Whether the engines compute on a single CPU thread, so that the process's CPU time is theirs.
        rounds: Blocks of each per sample.
        most: Blocks of each at most, where the machine is not quiet.
        block_s: Shortest block.
        calls: Fewest calls of a block.
        enough_s: Three rounds do, where they take this long: of calls of tens of milliseconds, more structures tell
            the model more than more calls. Nor is it worth waiting long for a quiet moment: neighbours stay for tens of
            seconds, and slow both engines down by much the same.
        max_s: No more rounds after this long.
        clock: Seconds, for tests.
        cpu_clock: CPU seconds of this process, for tests.
    """

    def __init__(
        self,
        dense: Timed,
        *,
        one_thread: bool = False,
        rounds: int = 8,
        most: int = 20,
        block_s: float = 0.004,
        calls: int = 2,
        enough_s: float = 0.3,
        max_s: float = 0.8,
        clock: Clock = time.perf_counter,
        cpu_clock: Clock = time.process_time,
    ) -> None:
        self.dense, self.one_thread = dense, one_thread
        self.rounds, self.most, self.block_s, self.calls = rounds, most, block_s, calls
        self.enough_s, self.max_s = enough_s, max_s
        self._clock, self._cpu = clock, cpu_clock
        self._floors: list[float] = []
        warm_up(dense, Settings(block_s=block_s), clock)

    def _block(self, runner: Timed) -> list[tuple[float, float]]:
        """(wall, floor-relevant) seconds of each call; the first call finds cold caches and is not counted."""
        own: Callable[[float, int], list[float]] | None = getattr(runner, "block", None)
        if own is not None:
            return [(seconds, seconds) for seconds in own(self.block_s, self.calls)]
        clock, cpu, call = self._clock, self._cpu if self.one_thread else self._clock, runner.call
        call()
        times: list[tuple[float, float]] = []
        start = now = clock()
        while len(times) < self.calls or now - start < self.block_s:
            busy, before = cpu(), clock()
            call()
            now = clock()
            times.append((now - before, cpu() - busy))
        return times

    def __call__(self, thin: Timed) -> dict[str, float]:
        """Measures one structure.

        Returns:
            ``ratio`` (thin over dense, of the floors), ``dense_ms`` and ``thin_ms`` (medians), and
            ``dense_floor_ms``: where it lies above that of other samples, the machine was disturbed.
        """
        dense_times: list[tuple[float, float]] = []
        thin_times: list[tuple[float, float]] = []
        with no_garbage_collection():
            start = self._clock()
            for done in range(1, self.most + 1):
                dense_times += self._block(self.dense)
                thin_times += self._block(thin)
                if done < self.rounds and (done < LEAST_ROUNDS or self._clock() - start < self.enough_s):
                    continue
                floor = float(np.quantile([t for _, t in dense_times], FLOOR))
                if floor <= usual([*self._floors, floor]) * (1 + QUIET) or self._clock() - start > self.max_s:
                    break
        self._floors.append(floor)
        thin_floor = float(np.quantile([t for _, t in thin_times], FLOOR))
        return {
            "ratio": thin_floor / floor,
            "dense_ms": 1e3 * float(np.median([w for w, _ in dense_times])),
            "thin_ms": 1e3 * float(np.median([w for w, _ in thin_times])),
            "dense_floor_ms": 1e3 * floor,
        }
