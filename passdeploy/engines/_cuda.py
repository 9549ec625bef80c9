"""Device memory, events and graphs through cuda-bindings, which needs no CUDA toolkit, only a driver."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from passdeploy.errors import BadInput, Unavailable

NO_DRIVER = ("cudaErrorNoDevice", "cudaErrorInsufficientDriver", "cudaErrorInitializationError",
             "cudaErrorSystemDriverMismatch", "cudaErrorSystemNotReady", "cudaErrorStubLibrary")  # fmt: skip
"""What keeps every engine from running; anything else is about the one at hand."""


def check(result: tuple[Any, ...]) -> Any:
    """Unpacks what a cuda-bindings function returns.

    Raises:
        Unavailable: The CUDA error by name: there is no GPU that could be used.
        BadInput: Likewise: what was asked of it failed.
    """
    from cuda.bindings import runtime

    status, *values = result
    if int(status) != 0:
        _, name = runtime.cudaGetErrorName(status)
        told = name.decode() if isinstance(name, bytes) else str(status)
        if told in NO_DRIVER:
            raise Unavailable(f"CUDA: {told}; is an NVIDIA driver loaded (nvidia-smi)?")
        full = told == "cudaErrorMemoryAllocation"
        raise BadInput(f"CUDA: {told}" + ("; take a smaller --batch, or end what else uses the GPU" if full else ""))
    return values[0] if len(values) == 1 else tuple(values) or None


class Buffer:
    """Device memory of one tensor.

    Raises:
        BadInput: The GPU has no room for it, or an axis is negative: how long it is depends on the data.
    """

    def __init__(self, shape: tuple[int, ...], dtype: Any) -> None:
        from cuda.bindings import runtime

        if min(shape, default=0) < 0:  # one byte would be taken for it, and the engine would write past that
            raise BadInput(
                f"a tensor of shape {list(shape)} is as large as the data make it; export it with a fixed size"
            )
        self.shape, self.dtype = shape, np.dtype(dtype)
        self.nbytes = int(np.prod(shape, dtype=np.int64)) * self.dtype.itemsize
        self.pointer = int(check(runtime.cudaMalloc(max(1, self.nbytes))))

    def write(self, array: np.ndarray, stream: Any) -> None:
        """Copies from the host."""
        from cuda.bindings import runtime

        source = np.ascontiguousarray(array, self.dtype)
        if source.shape != self.shape:
            raise ValueError(f"shape {source.shape} does not fit a buffer of {self.shape}")
        kind = runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        check(runtime.cudaMemcpyAsync(self.pointer, source.ctypes.data, self.nbytes, kind, stream))
        check(runtime.cudaStreamSynchronize(stream))  # `source` must live until the copy is done

    def read(self, stream: Any) -> np.ndarray:
        """Copies to the host."""
        from cuda.bindings import runtime

        array = np.empty(self.shape, self.dtype)
        kind = runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        check(runtime.cudaMemcpyAsync(array.ctypes.data, self.pointer, self.nbytes, kind, stream))
        check(runtime.cudaStreamSynchronize(stream))
        return array

    def free(self) -> None:
        from cuda.bindings import runtime

        if self.pointer:
            runtime.cudaFree(self.pointer)
            self.pointer = 0


class Stream:
    """A CUDA stream with two events, and a graph captured on it."""

    def __init__(self) -> None:
        from cuda.bindings import runtime

        self._rt = runtime
        self.handle = check(runtime.cudaStreamCreateWithFlags(runtime.cudaStreamNonBlocking))
        self._start, self._stop = check(runtime.cudaEventCreate()), check(runtime.cudaEventCreate())
        self._graph: Any = None

    def synchronise(self) -> None:
        check(self._rt.cudaStreamSynchronize(self.handle))

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        """Captures what `enqueue` enqueues and returns the graph's launch: one call instead of one per kernel."""
        mode = self._rt.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        check(self._rt.cudaStreamBeginCapture(self.handle, mode))
        ended: tuple[Any, ...] = (1,)
        try:
            try:
                enqueue()
            finally:  # a capture that is left open poisons the stream
                ended = self._rt.cudaStreamEndCapture(self.handle)
            self._graph = check(self._rt.cudaGraphInstantiate(check(ended), 0))
        except BaseException:
            self._rt.cudaGetLastError()  # else the next kernel that is launched would seem to have failed
            raise
        finally:
            if int(ended[0]) == 0:
                self._rt.cudaGraphDestroy(ended[1])
        return lambda: check(self._rt.cudaGraphLaunch(self._graph, self.handle))

    def timed(self, enqueue: Callable[[], None]) -> tuple[float, float]:
        """Runs once; returns (device, host enqueue) seconds: between events, and until the call came back.

        The GPU is idle before, so that the few microseconds until the launch reaches it are inside: whoever asks for
        one inference waits for them as well.
        """
        check(self._rt.cudaEventRecord(self._start, self.handle))
        begun = time.perf_counter()
        enqueue()
        host = time.perf_counter() - begun
        check(self._rt.cudaEventRecord(self._stop, self.handle))
        check(self._rt.cudaEventSynchronize(self._stop))
        return check(self._rt.cudaEventElapsedTime(self._start, self._stop)) / 1e3, host

    def free(self) -> None:
        if self._graph is not None:
            self._rt.cudaGraphExecDestroy(self._graph)
        self._rt.cudaEventDestroy(self._start)
        self._rt.cudaEventDestroy(self._stop)
        self._rt.cudaStreamDestroy(self.handle)
