"""TensorRT and TensorRT-RTX in this process, through cuda-bindings: streams and CUDA graphs.

Each stream has an execution context, device memory, pinned host memory and, where the engine allows it, one CUDA graph
of copy in, inference and copy out, so that a call is one launch. Not run so far, for want of a GPU.
"""

from __future__ import annotations

import ctypes
import queue
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from passdeploy.errors import PassdeployError
from passdeploy.shipping.contents import EngineInfo
from passdeploy.shipping.executors.base import Executor
from passdeploy.shipping.sums import Refused


class _Pinned:
    """Page-locked host memory seen as an array: what copies that run beside the host need."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        from cuda.bindings import runtime

        from passdeploy.engines._cuda import check

        self.nbytes = int(np.prod(shape)) * dtype.itemsize
        self.pointer = int(check(runtime.cudaMallocHost(self.nbytes)))
        raw = (ctypes.c_byte * self.nbytes).from_address(self.pointer)
        self.array: np.ndarray = np.ndarray(shape, dtype, buffer=memoryview(raw))

    def free(self) -> None:
        from cuda.bindings import runtime

        runtime.cudaFreeHost(self.pointer)


class _Slot:
    """What one inference at a time needs."""

    def __init__(self, trt: Any, engine: Any, batch: int, cuda_graphs: bool) -> None:
        from passdeploy.engines._cuda import Buffer, Stream

        self.context = engine.create_execution_context()
        self.stream = Stream()
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        if len(inputs) != 1 or len(names) != 2:
            raise Refused(
                f"the engine has {len(inputs)} inputs and {len(names) - len(inputs)} outputs, expected one each"
            )
        (name,), (result,) = inputs, [other for other in names if other not in inputs]
        shape = tuple(batch if size < 0 else size for size in engine.get_tensor_shape(name))
        if shape[0] != batch or not self.context.set_input_shape(name, shape):
            raise Refused(f"the engine does not take batches of {batch}")
        self.source = Buffer(shape, trt.nptype(engine.get_tensor_dtype(name)))
        self.result = Buffer(tuple(self.context.get_tensor_shape(result)), trt.nptype(engine.get_tensor_dtype(result)))
        self.context.set_tensor_address(name, self.source.pointer)
        self.context.set_tensor_address(result, self.result.pointer)
        self.host_in = _Pinned(self.source.shape, self.source.dtype)
        self.host_out = _Pinned(self.result.shape, self.result.dtype)
        self.host_in.array[...] = 0
        self._all()  # the first inference may allocate, which a capture must not see
        self.stream.synchronise()
        self.launch: Callable[[], Any] = self._all
        if cuda_graphs:
            try:
                self.launch = self.stream.capture(self._all)
            except PassdeployError:  # an engine with control flow that depends on data can't be captured
                self.launch = self._all

    def enqueue(self) -> None:
        if not self.context.execute_async_v3(int(self.stream.handle)):
            raise Refused("the inference could not be enqueued")

    def _all(self) -> None:
        from cuda.bindings import runtime

        from passdeploy.engines._cuda import check

        kinds, stream = runtime.cudaMemcpyKind, self.stream.handle
        to_device, to_host = kinds.cudaMemcpyHostToDevice, kinds.cudaMemcpyDeviceToHost
        source, result = self.source, self.result
        check(runtime.cudaMemcpyAsync(source.pointer, self.host_in.pointer, source.nbytes, to_device, stream))
        self.enqueue()
        check(runtime.cudaMemcpyAsync(self.host_out.pointer, result.pointer, result.nbytes, to_host, stream))

    def run(self, images: np.ndarray) -> np.ndarray:
        np.copyto(self.host_in.array, images)
        self.launch()
        self.stream.synchronise()
        return np.array(self.host_out.array, dtype=np.float32)

    def free(self) -> None:
        for part in (self.source, self.result, self.host_in, self.host_out, self.stream):
            part.free()
        self.context = None


class TensorRtExecutor(Executor):
    """Runs an engine on one of several streams."""

    def __init__(self, trt: Any, runtime: Any, engine: Any, batch: int, streams: int, cuda_graphs: bool) -> None:
        self._runtime, self._engine = runtime, engine
        self._slots = [_Slot(trt, engine, batch, cuda_graphs) for _ in range(streams)]
        self._free: queue.SimpleQueue[_Slot] = queue.SimpleQueue()
        for slot in self._slots:
            self._free.put(slot)

    def run(self, images: np.ndarray) -> np.ndarray:
        slot = self._free.get()
        try:
            return slot.run(images)
        finally:
            self._free.put(slot)

    def bind(self, images: np.ndarray) -> None:
        slot = self._slots[0]
        slot.source.write(images, slot.stream.handle)

    def call(self) -> None:
        slot = self._slots[0]
        slot.enqueue()
        slot.stream.synchronise()

    def close(self) -> None:
        for slot in self._slots:
            slot.free()
        self._slots = []
        self._engine = self._runtime = None


def create(
    engine: EngineInfo, data: bytes, manifest: Mapping[str, Any], streams: int = 1, cuda_graphs: bool = True
) -> TensorRtExecutor:
    """Loads the engine.

    Args:
        engine: As the bundle describes it.
        data: The engine file.
        manifest: Not needed.
        streams: Inferences that may run at once.
        cuda_graphs: Whether a call replays a captured graph.
    """
    if engine.backend == "tensorrt_rtx":
        import tensorrt_rtx as trt
    else:
        import tensorrt as trt
    from cuda.bindings import runtime as cuda

    from passdeploy.engines._cuda import check

    title = "TensorRT-RTX" if engine.backend == "tensorrt_rtx" else "TensorRT"
    if engine.requires.get("exact_version") and trt.__version__ != engine.backend_version:
        raise Refused(
            f"engine {engine.id}: built by {title} {engine.backend_version}, this machine has {trt.__version__}; "
            f"install that version or compile it again"
        )
    try:
        check(cuda.cudaGetDeviceCount())  # a clear error before the library's own
        runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        loaded = runtime.deserialize_cuda_engine(data)
        if loaded is None:
            raise Refused(f"does not fit this GPU or this {title} {trt.__version__}; compile it again on this machine")
        return TensorRtExecutor(trt, runtime, loaded, engine.batch, streams, cuda_graphs)
    except PassdeployError as error:
        raise Refused(f"engine {engine.id}: {error}") from None
