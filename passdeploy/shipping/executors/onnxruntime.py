"""ONNX Runtime: the session that was measured, its settings included. A session is thread-safe by itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from passdeploy.errors import BadInput
from passdeploy.shipping.contents import EngineInfo
from passdeploy.shipping.executors.base import Executor
from passdeploy.shipping.packages import packages
from passdeploy.shipping.sums import Refused


class OrtExecutor(Executor):
    """Runs a session; inputs and outputs are host arrays."""

    def __init__(self, session: Any, device: str, number: int = 0) -> None:
        self._session = session
        self._place = device, number
        self._input = session.get_inputs()[0].name
        self._output = session.get_outputs()[0].name
        self._binding: Any = None
        self._held: np.ndarray | None = None

    def run(self, images: np.ndarray) -> np.ndarray:
        logits: np.ndarray = self._session.run([self._output], {self._input: images})[0]
        return logits

    def bind(self, images: np.ndarray) -> None:
        import onnxruntime as ort

        binding = self._session.io_binding()
        self._held = np.ascontiguousarray(images)  # on a CPU the value is a view of it, and need not keep it alive
        binding.bind_ortvalue_input(self._input, ort.OrtValue.ortvalue_from_numpy(self._held, *self._place))
        binding.bind_output(self._output, *self._place)
        self._session.run_with_iobinding(binding)
        binding.bind_ortvalue_output(self._output, binding.get_outputs()[0])
        self._binding = binding

    def call(self) -> None:
        self._session.run_with_iobinding(self._binding)

    def close(self) -> None:
        self._binding = self._session = self._held = None


def create(
    engine: EngineInfo,
    data: bytes,
    manifest: Mapping[str, Any],
    threads: int | None = None,
    device: int | None = None,
) -> OrtExecutor:
    """Loads the engine.

    Args:
        engine: As the bundle describes it.
        data: The engine file.
        manifest: Not needed.
        threads: Of one inference; None: as the engine was measured.
        device: CUDA's number of the GPU; None: the first.
    """
    import onnxruntime as ort

    from passdeploy.engines.onnxruntime import CUDA, session

    on_gpu = bool(engine.requires.get("compute_capabilities"))
    providers: list[Any] = ["CPUExecutionProvider"]
    if on_gpu:
        if CUDA[0] not in ort.get_available_providers():
            install = " ".join(packages(engine))
            raise Refused(
                f"engine {engine.id}: this onnxruntime has no {CUDA[0]}; pip install {install} in place of onnxruntime"
            )
        name, measured = CUDA
        providers = [(name, measured if device is None else {**measured, "device_id": str(device)})]
    elif device is not None:
        raise BadInput(f"device=: engine {engine.id} runs on a CPU")
    settings = {str(key): str(value) for key, value in engine.meta.get("session", {}).items()}
    try:
        loaded = session(data, engine.threads if threads is None else threads, providers, settings)
    except BadInput as error:
        raise Refused(f"engine {engine.id}: {error}") from None
    return OrtExecutor(loaded, "cuda" if on_gpu else "cpu", device or 0)
