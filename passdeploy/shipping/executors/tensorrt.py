"""TensorRT and TensorRT-RTX in this process, through cuda-bindings: streams and CUDA graphs.

Each stream has an execution context, device memory, pinned host memory and, where the engine allows it, a CUDA graph of
the inference, so that a call is two copies and one launch. Images may lie on the GPU already: any array that speaks the
CUDA array interface (pycuda, cupy, torch), in the device's primary context (``import pycuda.autoprimaryctx``).

On a GPU: tests/gpu/test_gpu_runner.py. Not run so far, for want of one; without it the same code runs in the tests over
an emulated CUDA run time.
"""

from __future__ import annotations

import ctypes
import queue
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np

from passdeploy.errors import BadInput, PassdeployError
from passdeploy.shipping.contents import EngineInfo
from passdeploy.shipping.executors.base import Executor
from passdeploy.shipping.sums import Refused

if TYPE_CHECKING:
    from passdeploy.engines._cuda import Buffer, Stream
    from passdeploy.kernels.interface import View


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
        with ExitStack() as parts:  # a GPU that is full half way through must get back what was taken
            self._prepare(trt, engine, batch, parts)
            self.source.write(np.zeros(self.source.shape, self.source.dtype), self.stream.handle)
            self.enqueue()  # the first inference may allocate, which a capture must not see
            self.stream.synchronise()
            self.launch = self._captured() if cuda_graphs else self.enqueue
            self._parts = parts.pop_all()

    def _prepare(self, trt: Any, engine: Any, batch: int, parts: ExitStack) -> None:
        from passdeploy.engines._cuda import Buffer, Stream
        from passdeploy.engines._trt_context import context_of

        def held(part: Any) -> Any:
            parts.callback(part.free)
            return part

        self.context = context_of(trt, engine)
        self.stream: Stream = held(Stream())
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
        shapes = {name: shape, result: tuple(self.context.get_tensor_shape(result))}
        made = {n: held(Buffer(size, trt.nptype(engine.get_tensor_dtype(n)))) for n, size in shapes.items()}
        self.source: Buffer = made[name]
        self.result: Buffer = made[result]
        for tensor, buffer in made.items():
            self.context.set_tensor_address(tensor, buffer.pointer)
        self.host_in: _Pinned = held(_Pinned(self.source.shape, self.source.dtype))
        self.host_out: _Pinned = held(_Pinned(self.result.shape, self.result.dtype))

    def _captured(self) -> Callable[[], Any]:
        """The launch of a graph of the inference; its plain enqueueing where the engine can't be captured."""
        capturable = getattr(self.context, "is_stream_capturable", lambda stream: True)  # TensorRT-RTX can tell
        if not capturable(int(self.stream.handle)):
            return self.enqueue
        try:
            return self.stream.capture(self.enqueue)
        except PassdeployError:  # control flow that depends on data
            return self.enqueue

    def enqueue(self) -> None:
        if not self.context.execute_async_v3(int(self.stream.handle)):
            raise Refused("the inference could not be enqueued")

    def run(self, images: np.ndarray) -> np.ndarray:
        np.copyto(self.host_in.array, images)
        return self._run(self.host_in.pointer, self.source.nbytes, "cudaMemcpyHostToDevice")

    def run_on_device(self, address: int, count: int) -> np.ndarray:
        """The first `count` images of a batch, which lie at an address of the GPU; what follows them is ignored."""
        nbytes = self.source.nbytes // self.source.shape[0] * count
        return self._run(address, nbytes, "cudaMemcpyDeviceToDevice")[:count]

    def _run(self, address: int, nbytes: int, kind: str) -> np.ndarray:
        from cuda.bindings import runtime

        from passdeploy.engines._cuda import check

        kinds, stream, result = runtime.cudaMemcpyKind, self.stream.handle, self.result
        try:
            check(runtime.cudaMemcpyAsync(self.source.pointer, address, nbytes, getattr(kinds, kind), stream))
            self.launch()
            to_host = kinds.cudaMemcpyDeviceToHost
            check(runtime.cudaMemcpyAsync(self.host_out.pointer, result.pointer, result.nbytes, to_host, stream))
            self.stream.synchronise()
        except BadInput as error:  # the images are of the right kind: it is no mistake of who sent them
            raise Refused(f"the inference failed: {error}") from None
        return np.array(self.host_out.array, dtype=np.float32)

    def free(self) -> None:
        self.context = None
        self._parts.close()


def _select(device: int | None) -> None:
    """Makes that GPU the calling thread's current one; None: leaves what is.

    Each thread has its own, the first GPU to begin with, and what else runs in it may change that between two calls:
    a stream of another GPU than the current one takes no work.
    """
    from cuda.bindings import runtime

    from passdeploy.engines._cuda import check

    if device is not None:
        check(runtime.cudaSetDevice(device))


class TensorRtExecutor(Executor):
    """Runs an engine on one of several streams."""

    def __init__(
        self, trt: Any, runtime: Any, engine: Any, batch: int, streams: int, cuda_graphs: bool, device: int | None
    ) -> None:
        self._runtime, self._engine, self._device = runtime, engine, device
        self._slots: list[_Slot] = []
        self._free: queue.SimpleQueue[_Slot] = queue.SimpleQueue()
        try:
            for _ in range(streams):
                self._slots.append(_Slot(trt, engine, batch, cuda_graphs))
                self._free.put(self._slots[-1])
        except BaseException:
            self.close()  # one stream too many for the GPU's memory must not keep what the others took
            raise

    def run(self, images: np.ndarray) -> np.ndarray:
        _select(self._device)
        slot = self._free.get()
        try:
            return slot.run(images)
        finally:
            self._free.put(slot)

    def run_on_device(self, images: View) -> np.ndarray:
        from cuda.bindings import runtime

        from passdeploy.engines._cuda import check

        _select(self._device)
        slot = self._free.get()
        try:
            if slot.source.dtype != np.float32:
                raise BadInput(f"images: the engine takes {slot.source.dtype} on the GPU; give host arrays")
            if images.stream is not None:  # whoever fills the array has to be done
                check(runtime.cudaStreamSynchronize(images.stream))
            batch = slot.source.shape[0]
            image = slot.source.nbytes // batch
            starts = range(0, images.shape[0], batch)
            return np.concatenate(
                [slot.run_on_device(images.address + at * image, min(batch, images.shape[0] - at)) for at in starts]
            )
        finally:
            self._free.put(slot)

    def bind(self, images: np.ndarray) -> None:
        _select(self._device)
        slot = self._slots[0]
        slot.source.write(images, slot.stream.handle)

    def call(self) -> None:
        _select(self._device)
        slot = self._slots[0]
        slot.launch()
        slot.stream.synchronise()

    def close(self) -> None:
        _select(self._device)
        for slot in self._slots:
            slot.free()
        self._slots = []
        self._engine = self._runtime = None


def create(
    engine: EngineInfo,
    data: bytes,
    manifest: Mapping[str, Any],
    streams: int = 1,
    cuda_graphs: bool = True,
    device: int | None = None,
) -> TensorRtExecutor:
    """Loads the engine.

    Args:
        engine: As the bundle describes it.
        data: The engine file.
        manifest: Not needed.
        streams: Inferences that may run at once.
        cuda_graphs: Whether a call replays a captured graph.
        device: CUDA's number of the GPU; None: the calling thread's current one, in every thread that
            calls.
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
        _select(device)
        runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        if not engine.requires.get("exact_version"):  # a version-compatible engine brings TensorRT's lean runtime along
            runtime.engine_host_code_allowed = True
        loaded = runtime.deserialize_cuda_engine(data)
        if loaded is None:
            raise Refused(f"does not fit this GPU or this {title} {trt.__version__}; compile it again on this machine")
        return TensorRtExecutor(trt, runtime, loaded, engine.batch, streams, cuda_graphs, device)
    except PassdeployError as error:
        raise Refused(f"engine {engine.id}: {error}") from None
