"""A CUDA run time and a TensorRT whose device is the host: what the executor does runs, down to every address.

Work of a stream is queued and only done when the stream is synchronised, so that a missing synchronisation, a wrong
order or memory that was freed too early gives wrong numbers, as it would on a GPU. A capture records
instead of queuing. There may be several GPUs: a stream belongs to the one that was current where it was made, and takes
an inference only from threads whose current one that is. The engine is a matrix product of the flattened images.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np


class Kinds:
    cudaMemcpyHostToDevice = "to device"
    cudaMemcpyDeviceToHost = "to host"
    cudaMemcpyDeviceToDevice = "on device"


class Stream:
    def __init__(self, gpu: int = 0) -> None:
        self.gpu = gpu
        self.queued: list[Callable[[], None]] = []
        self.captured: list[Callable[[], None]] | None = None

    def __int__(self) -> int:
        return id(self)

    def add(self, work: Callable[[], None]) -> None:
        (self.queued if self.captured is None else self.captured).append(work)


class HostCuda(ModuleType):
    """`cuda.bindings.runtime`, as far as it is used."""

    cudaMemcpyKind = Kinds
    cudaStreamNonBlocking = 1
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=0)

    def __init__(self, memory: int = 1 << 30, gpus: int = 1) -> None:
        super().__init__("cuda.bindings.runtime")
        self.gpus, self.current = gpus, threading.local()
        self.device: dict[int, Any] = {}
        self.pinned: dict[int, Any] = {}
        self.legacy = Stream()
        self.streams: dict[int, Stream] = {}
        self.left = memory
        self.launches = self.graph_launches = self.last_error = 0
        self.lock = threading.Lock()

    def cudaSetDevice(self, number: int) -> tuple[int]:
        if not 0 <= number < self.gpus:
            return (101,)
        self.current.gpu = number
        return (0,)

    def here(self) -> int:
        """The calling thread's current GPU."""
        return getattr(self.current, "gpu", 0)

    def _take(self, where: dict[int, Any], size: int) -> tuple[int, int]:
        with self.lock:
            if size > self.left:
                return 2, 0
            self.left -= size
            held = (ctypes.c_byte * size)()
            where[ctypes.addressof(held)] = held
            return 0, ctypes.addressof(held)

    def cudaMalloc(self, size: int) -> tuple[int, int]:
        return self._take(self.device, size)

    def cudaMallocHost(self, size: int) -> tuple[int, int]:
        return self._take(self.pinned, size)

    def cudaFree(self, pointer: int) -> tuple[int]:
        self.left += len(self.device.pop(pointer))
        return (0,)

    def cudaFreeHost(self, pointer: int) -> tuple[int]:
        self.left += len(self.pinned.pop(pointer))
        return (0,)

    def on_device(self, address: int, size: int) -> bool:
        return any(start <= address and address + size <= start + len(held) for start, held in self.device.items())

    def cudaMemcpyAsync(self, to: int, source: int, size: int, kind: str, stream: Stream) -> tuple[int]:
        if (kind in ("to device", "on device")) != self.on_device(to, size):
            return (1,)
        if (kind in ("to host", "on device")) != self.on_device(source, size):
            return (1,)
        stream.add(lambda: ctypes.memmove(to, source, size) and None)
        return (0,)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[int, Stream]:
        stream = Stream(self.here())
        self.streams[id(stream)] = stream
        return 0, stream

    def cudaStreamSynchronize(self, stream: Stream | int) -> tuple[int]:
        found = self.legacy if stream == 1 else self.streams[int(stream)]
        while found.queued:
            found.queued.pop(0)()
        return (0,)

    def cudaStreamDestroy(self, stream: Stream) -> tuple[int]:
        del self.streams[int(stream)]
        return (0,)

    def cudaStreamBeginCapture(self, stream: Stream, mode: int) -> tuple[int]:
        stream.captured = []
        return (0,)

    def cudaStreamEndCapture(self, stream: Stream) -> tuple[int, Any]:
        captured, stream.captured = stream.captured, None
        return 0, captured

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> tuple[int, Any]:
        return 0, list(graph)

    def cudaGraphDestroy(self, graph: list[Any]) -> tuple[int]:
        graph.clear()
        return (0,)

    def cudaGraphExecDestroy(self, graph: list[Any]) -> tuple[int]:
        graph.clear()
        return (0,)

    def cudaGraphLaunch(self, graph: list[Callable[[], None]], stream: Stream) -> tuple[int]:
        if stream.gpu != self.here():
            return (400,)
        self.graph_launches += 1
        for work in graph:
            stream.add(work)
        return (0,)

    def cudaGetLastError(self) -> tuple[int]:
        last, self.last_error = self.last_error, 0
        return (last,)

    def cudaEventCreate(self) -> tuple[int, object]:
        return 0, object()

    def cudaEventDestroy(self, event: object) -> tuple[int]:
        return (0,)

    def cudaGetDeviceCount(self) -> tuple[int, int]:
        return 0, self.gpus

    def cudaGetErrorName(self, status: int) -> tuple[int, bytes]:
        return 0, {
            1: b"cudaErrorInvalidValue",
            2: b"cudaErrorMemoryAllocation",
            101: b"cudaErrorInvalidDevice",
            400: b"cudaErrorInvalidResourceHandle",
        }[status]


class Context:
    def __init__(self, engine: HostEngine) -> None:
        self.engine, self.addresses, self.shape = engine, {}, ()

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shape = shape
        return shape[0] <= self.engine.batch

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shape if name == "images" else (self.shape[0], self.engine.weights.shape[1])

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def is_stream_capturable(self, stream: int) -> bool:
        return self.engine.capturable

    def execute_async_v3(self, stream: int) -> bool:
        found, cuda = self.engine.cuda.streams[stream], self.engine.cuda
        if found.gpu != cuda.here():
            return False
        cuda.launches += found.captured is None

        def product() -> None:
            (source, to), out = (self.addresses[n] for n in ("images", "logits")), self.get_tensor_shape("logits")
            images = np.ctypeslib.as_array((ctypes.c_float * int(np.prod(self.shape))).from_address(source))
            logits = np.ctypeslib.as_array((ctypes.c_float * int(np.prod(out))).from_address(to))
            logits[:] = (images.reshape(out[0], -1) @ self.engine.weights).ravel()

        found.add(product)
        return True


class HostEngine:
    """An `ICudaEngine` with a dynamic batch of up to `batch`."""

    num_io_tensors = 2
    device_memory_size_v2 = 3 << 20
    contexts = 1000
    """For how many the GPU has room."""

    def __init__(self, cuda: HostCuda, shape: tuple[int, ...], classes: int, batch: int, capturable: bool) -> None:
        self.cuda, self.shape, self.batch, self.capturable = cuda, shape, batch, capturable
        self.strategies: list[str | None] = []
        """Of each context; None: it was made without a configuration."""
        rng = np.random.default_rng(3)
        self.weights = rng.normal(size=(int(np.prod(shape)), classes)).astype(np.float32)

    def create_runtime_config(self) -> SimpleNamespace:
        return SimpleNamespace(dynamic_shapes_kernel_specialization_strategy="lazy")

    def create_execution_context(self, config: SimpleNamespace | None = None) -> Context | None:
        if len(self.strategies) == self.contexts:
            return None
        self.strategies.append(None if config is None else config.dynamic_shapes_kernel_specialization_strategy)
        return Context(self)

    def get_tensor_name(self, index: int) -> str:
        return ("images", "logits")[index]

    def get_tensor_mode(self, name: str) -> str:
        return "in" if name == "images" else "out"

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1, *self.shape) if name == "images" else (-1, self.weights.shape[1])

    def get_tensor_dtype(self, name: str) -> type:
        return np.float32


def tensorrt(cuda: HostCuda, engine: HostEngine | None, version: str = "11.0.0", rtx: bool = False) -> ModuleType:
    """A `tensorrt` module (`tensorrt_rtx`: it has kernels for shapes) whose run time gives out `engine`."""
    module: Any = ModuleType("tensorrt")
    module.__version__ = version
    module.TensorIOMode = SimpleNamespace(INPUT="in", OUTPUT="out")
    module.nptype = lambda kind: kind

    if rtx:
        module.DynamicShapesKernelSpecializationStrategy = SimpleNamespace(LAZY="lazy", EAGER="eager")
    module.IProfiler = object

    class Logger:
        ERROR = 0

        def __init__(self, level: int) -> None:
            self.level = level

    module.Logger = Logger
    module.Runtime = lambda logger: SimpleNamespace(deserialize_cuda_engine=lambda data: engine)
    return module


class DeviceArray:
    """An array of the emulated GPU, as pycuda's `GPUArray` presents itself."""

    version = 3

    def __init__(self, cuda: HostCuda, values: np.ndarray, stream: Stream | None = None) -> None:
        _, self.address = cuda.cudaMalloc(max(1, values.nbytes))
        self.values, self.stream = np.ascontiguousarray(values), stream

        def fill() -> None:
            ctypes.memmove(self.address, self.values.ctypes.data, self.values.nbytes)

        fill() if stream is None else stream.add(fill)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        given: dict[str, Any] = {"shape": self.values.shape, "typestr": self.values.dtype.str, "version": self.version}
        given |= {"data": (self.address, False), "strides": None}
        named = self.stream is not None and self.version >= 3
        return given | ({"stream": int(self.stream)} if named else {})
