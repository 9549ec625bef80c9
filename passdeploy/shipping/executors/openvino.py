"""OpenVINO on a CPU: the compile settings that were measured, and infer requests that threads take in turns."""

from __future__ import annotations

import functools
import io
import queue
from collections.abc import Mapping
from typing import Any

import numpy as np

from passdeploy.shipping.contents import EngineInfo
from passdeploy.shipping.executors.base import Executor
from passdeploy.shipping.sums import Refused


class OpenVinoExecutor(Executor):
    """Runs a compiled model; an infer request serves one call at a time, so there is a pool of them."""

    def __init__(self, compiled: Any, streams: int) -> None:
        self._compiled = compiled
        self._free: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for _ in range(streams):
            self._free.put(compiled.create_infer_request())
        self._bound: Any = None
        self._request: Any = None

    def run(self, images: np.ndarray) -> np.ndarray:
        request = self._free.get()
        try:
            results = request.infer({0: images}, share_inputs=True)
            return np.array(results[0], dtype=np.float32)
        finally:
            self._free.put(request)

    def bind(self, images: np.ndarray) -> None:
        import openvino as ov

        self._bound = np.array(images, order="C")
        self._request = self._compiled.create_infer_request()
        self._request.set_input_tensor(ov.Tensor(self._bound, shared_memory=True))

    def call(self) -> None:
        self._request.infer(share_outputs=True)

    def close(self) -> None:
        while not self._free.empty():
            self._free.get()
        self._request = self._bound = self._compiled = None


def create(
    engine: EngineInfo, data: bytes, manifest: Mapping[str, Any], threads: int | None = None, streams: int = 1
) -> OpenVinoExecutor:
    """Loads the engine.

    Args:
        engine: As the bundle describes it.
        data: The engine file.
        manifest: Not needed.
        threads: Of one inference; None: as the engine was measured.
        streams: Inferences that may run at once; more of them trade latency for throughput.
    """
    import openvino as ov

    settings = dict(engine.meta.get("settings", {}))
    if threads is not None:
        settings["INFERENCE_NUM_THREADS"] = threads
    if streams > 1:
        settings["NUM_STREAMS"] = streams
        if "INFERENCE_NUM_THREADS" in settings:  # counts those of all streams
            settings["INFERENCE_NUM_THREADS"] *= streams
    core = _core()
    try:
        compiled = core.compile_model(core.read_model(io.BytesIO(data)), "CPU", settings)
    except Exception as error:
        told = " ".join(str(error).split())[:200]
        raise Refused(f"engine {engine.id}: OpenVINO {ov.__version__} does not take it ({told})") from None
    return OpenVinoExecutor(compiled, streams)


@functools.cache
def _core() -> Any:
    """One for the process: of two, the first to go leaves a signal stack of freed memory (see engines/openvino.py)."""
    import openvino as ov

    return ov.Core()
