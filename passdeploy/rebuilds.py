"""How far the latency of an engine depends on chance: on which build of a graph it is, or on how it was loaded.

A builder that chooses kernels by timing them (TensorRT, inductor's autotuning) gives another engine each time. So where
its target is attached the graph is built again, without what earlier builds remembered, and all of its engines are
timed in turns. Elsewhere builds are the same and loads differ, by where buffers happen to lie: then one engine is
loaded several times. The engine that ships is the first of them, the one that everything else was measured on.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, replace
from typing import Literal

import numpy as np

from passdeploy.engines._common import told
from passdeploy.engines.base import CompileInput, Engine, Runner, get_backend
from passdeploy.errors import PassdeployError
from passdeploy.latency.measure import Settings, interleave
from passdeploy.targets import Target
from passdeploy.timing import open_runner

TIMES = 3
"""Builds or loads in all, the engine that ships included."""
MOST_BUILD_S = 300.0
"""Where one build took longer than this none is repeated: knowing the spread is not worth a quarter of an hour."""
SETTINGS = Settings(pairs=9, block_s=0.01, block_calls=1, warmup_s=0.02, precise=None, max_s=3.0)
"""Half a second for three engines of a millisecond; the clock decides nothing."""


@dataclass(frozen=True)
class Rebuilds:
    """How far builds, or loads, of the same graph lie apart.

    Attributes:
        of: What was repeated; None: nothing.
        n: How many were timed in turns, the engine that ships included.
        spread: (Slowest - fastest) / median of their latencies; None: not measured.
        latency_ms: Of each, the engine that ships first.
        reason: Why nothing was measured; None: it was.
    """

    of: Literal["builds", "loads"] | None = None
    n: int = 0
    spread: float | None = None
    latency_ms: tuple[float, ...] = ()
    reason: str | None = None


def with_rebuilds(
    engine: Engine, source: CompileInput, target: Target, images: np.ndarray, scope: str = "engine"
) -> Engine:
    """The engine with ``rebuilds`` in its record: `Rebuilds` as JSON.

    Args:
        engine: The one that ships; its bytes stay as they are.
        source: What it was compiled from.
        target: What it was compiled for.
        images: (batch, 3, H, W) to time it on.
        scope: ``engine`` or ``end_to_end``.
    """
    return replace(engine, meta={**engine.meta, "rebuilds": asdict(rebuilds(engine, source, target, images, scope))})


def rebuilds(engine: Engine, source: CompileInput, target: Target, images: np.ndarray, scope: str) -> Rebuilds:
    """Builds again, or loads again, and times all of them in turns. What goes wrong with a build is the reason."""
    backend = get_backend(engine.backend)
    if not target.attached:
        return Rebuilds(reason=f"no {target.device} is attached to this machine")
    if reason := backend.runnable(target):
        return Rebuilds(reason=reason)
    varies = backend.builds_vary(target)
    taken = float(engine.meta.get("build_s", 0.0))
    if varies and taken > MOST_BUILD_S:
        return Rebuilds(reason=f"a build takes {taken:.0f} s")
    try:
        others = [backend.rebuild(source, target) if varies else engine for _ in range(TIMES - 1)]
        times = _latencies([engine, *others], target, images, scope)
    except PassdeployError as error:
        return Rebuilds(reason=str(error))
    spread = (max(times) - min(times)) / statistics.median(times)
    return Rebuilds("builds" if varies else "loads", len(times), spread, tuple(times))


def _latencies(engines: list[Engine], target: Target, images: np.ndarray, scope: str) -> list[float]:
    """Milliseconds of each, all loaded at once and taking turns; by the ratio to the first, which no drift moves."""
    runners: dict[str, Runner] = {}
    try:
        with told("one of the engines"):  # there may be memory for one of them, and not for all
            for index, engine in enumerate(engines):
                runners[str(index)] = open_runner(engine, target, images, scope)
            compared = interleave(runners, SETTINGS)
    finally:
        for runner in reversed(runners.values()):
            runner.close()
    first = compared.measurements["0"]
    ms = first.mean if first.p50 is None else first.p50
    return [ms, *(ms / compared.ratio(name).value for name in list(runners)[1:])]
