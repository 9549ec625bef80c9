"""Any other backend: through `passdeploy.engines`, with whatever that backend imports (torch, for AOTInductor)."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from passdeploy.errors import BadInput, Unavailable
from passdeploy.shipping.contents import EngineInfo
from passdeploy.shipping.executors.base import Executor
from passdeploy.shipping.sums import Refused


class EngineExecutor(Executor):
    """Runs an engine's own runner, one call at a time."""

    def __init__(self, runner: Any, input_name: str, output_name: str) -> None:
        self._runner = runner
        self._input, self._output = input_name, output_name
        self._lock = threading.Lock()

    def run(self, images: np.ndarray) -> np.ndarray:
        with self._lock:
            return np.array(self._runner.run({self._input: images})[self._output], dtype=np.float32)

    def bind(self, images: np.ndarray) -> None:
        self._runner.bind({self._input: images})

    def call(self) -> None:
        self._runner.call()

    def close(self) -> None:
        self._runner.close()


def create(engine: EngineInfo, data: bytes, manifest: Mapping[str, Any]) -> EngineExecutor:
    """Loads the engine with the backend that compiled it."""
    from passdeploy.engines.base import Engine, get_backend
    from passdeploy.environment import usable_cores
    from passdeploy.targets import Target

    entry = next(e for e in manifest["engines"] if e["id"] == engine.id)
    if not engine.requires.get("compute_capabilities") and engine.threads > (cores := usable_cores()):
        raise Refused(
            f"engine {engine.id}: it computes on {engine.threads} threads, and this machine lets a process use {cores}"
        )
    capabilities = engine.requires.get("compute_capabilities") or [None]
    target = Target(
        name=engine.target,
        device=entry["device"],
        compute_capability=capabilities[0],
        backend=engine.backend,
        precision=engine.precision,
        batch=engine.batch,
        threads=engine.threads,
        attached=True,
    )
    try:
        backend = get_backend(engine.backend)
        reason = backend.runnable(target)
        if reason is not None:
            raise Refused(f"engine {engine.id}: backend {engine.backend}: {reason}")
        runner = backend.runner(Engine(engine.backend, data, PurePosixPath(engine.file).suffix, engine.meta), target)
    except (BadInput, Unavailable) as error:
        raise Refused(f"engine {engine.id}: {error}") from None
    return EngineExecutor(runner, manifest["input"]["name"], manifest["output"]["name"])
