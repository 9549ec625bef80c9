"""Loads the compiled kernels into a GPU and launches them: through cuda-bindings, or through pycuda.

Both take machine code from the package when it has any, else they compile the source with NVRTC.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator
from functools import cache
from typing import Any

from passdeploy.errors import BadInput, PassdeployError, Unavailable
from passdeploy.kernels import build
from passdeploy.kernels.geometry import Launch


@cache
def unavailable() -> str | None:
    """Why no kernel can be launched here, and what to do about it; None when one can."""
    try:  # asked first: without a driver some of CUDA's Python packages hang instead of failing
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no NVIDIA driver (libcuda.so.1) on this machine"
    try:
        CudaBindings()
    except PassdeployError as error:
        return str(error)
    return None


class CudaBindings:
    """Launches through cuda-bindings.

    Args:
        device: Launches in this device's primary context, which is the one PyTorch uses. None: in the context that is
            current on the calling thread, or in the first device's primary context when none is.

    Raises:
        Unavailable: No driver, no device, or no cuda-bindings.
    """

    def __init__(self, device: int | None = None) -> None:
        try:
            from cuda.bindings import driver
        except ImportError as error:
            raise Unavailable("cuda-bindings is not installed; pip install 'passdeploy[cuda]'") from error
        self._driver = driver
        self._functions: dict[tuple[int, str], Any] = {}
        self._modules: dict[tuple[int, str], Any] = {}
        self._lock = threading.Lock()
        try:
            self._call(driver.cuInit(0))
            if self._call(driver.cuDeviceGetCount()) < 1:
                raise Unavailable("the NVIDIA driver lists no device")
        except (RuntimeError, PassdeployError) as error:  # RuntimeError: libcuda can't be loaded
            raise Unavailable(f"the NVIDIA driver can't be used: {error}") from error
        self._own = None if device is None else self._primary(device)

    def _call(self, result: tuple[Any, ...]) -> Any:
        status, *values = result
        if int(status) != 0:
            raise PassdeployError(f"CUDA driver: {getattr(status, 'name', status)}")
        return values[0] if values else None

    def _primary(self, ordinal: int) -> Any:
        return self._call(self._driver.cuDevicePrimaryCtxRetain(self._call(self._driver.cuDeviceGet(ordinal))))

    @contextlib.contextmanager
    def _context(self) -> Iterator[int]:
        """The context to launch in, as a number; current meanwhile. A thread of PyTorch's may have none yet."""
        driver = self._driver
        current = self._call(driver.cuCtxGetCurrent())
        if self._own is None:
            if int(current) == 0:
                current = self._primary(0)
                self._call(driver.cuCtxSetCurrent(current))
            yield int(current)
        elif int(current) == int(self._own):
            yield int(current)
        else:
            self._call(driver.cuCtxPushCurrent(self._own))
            try:
                yield int(self._own)
            finally:
                self._call(driver.cuCtxPopCurrent())

    def device_of(self, address: int) -> int:
        """The number of the device whose memory an address lies in."""
        driver = self._driver
        wanted = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
        with self._context():
            return int(self._call(driver.cuPointerGetAttribute(wanted, driver.CUdeviceptr(address))))

    def capability(self) -> int:
        """Compute capability of the current context's device, times ten."""
        driver, names = self._driver, self._driver.CUdevice_attribute
        device = self._call(driver.cuCtxGetDevice())
        major = self._call(driver.cuDeviceGetAttribute(names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device))
        minor = self._call(driver.cuDeviceGetAttribute(names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device))
        return int(major) * 10 + int(minor)

    def _module(self, context: int, source: str) -> Any:
        key = (context, source)
        if key not in self._modules:
            driver = self._driver
            packaged = build.prebuilt(source)
            status, module = driver.cuModuleLoadData(packaged) if packaged else (1, None)
            if int(status) != 0:  # none packaged, or none of them for this device and driver
                module = self._call(driver.cuModuleLoadData(build.compiled(source, self.capability())))
            self._modules[key] = module
        return self._modules[key]

    def _function(self, context: int, kernel: str) -> Any:
        key = (context, kernel)
        with self._lock:
            if key not in self._functions:
                module = self._module(context, build.source_of(kernel))
                self._functions[key] = self._call(self._driver.cuModuleGetFunction(module, kernel.encode()))
            return self._functions[key]

    def prepare(self) -> None:
        """Loads all of the kernels' code; what is wrong with it is raised here, not by the first launch."""
        with self._context() as context, self._lock:
            for source in build.SOURCES:
                self._module(context, source)

    def launch(self, launch: Launch, stream: int) -> None:
        """See `Loader`. The parameters are copied before this returns."""
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(launch.params))
        with self._context() as context:
            self._call(
                self._driver.cuLaunchKernel(
                    self._function(context, launch.kernel),
                    *launch.grid,
                    launch.threads,
                    1,
                    1,
                    launch.shared_bytes,
                    self._driver.CUstream(stream),
                    ctypes.addressof(pointers),
                    0,
                )
            )

    def wait(self, stream: int, other: int) -> None:
        """See `Loader`: on the GPU, the calling thread goes on."""
        driver = self._driver
        with self._context():
            event = self._call(driver.cuEventCreate(driver.CUevent_flags.CU_EVENT_DISABLE_TIMING))
            try:
                self._call(driver.cuEventRecord(event, driver.CUstream(other)))
                self._call(driver.cuStreamWaitEvent(driver.CUstream(stream), event, 0))
            finally:  # once it has happened: the driver keeps it that long
                self._call(driver.cuEventDestroy(event))


class Pycuda:
    """The same through pycuda, for programs that keep their own context with it.

    Args:
        stream: A ``pycuda.driver.Stream`` to launch into; None: the default stream.

    One loader belongs to the context that is current when it is made; ``import pycuda.autoprimaryctx`` makes it that
    of PyTorch.

    Raises:
        Unavailable: No pycuda.
    """

    def __init__(self, stream: Any = None) -> None:
        try:
            import pycuda.driver as driver
        except ImportError as error:
            raise Unavailable(
                "pycuda can't be imported; it needs the CUDA toolkit to install: pip install 'passdeploy[pycuda]'"
            ) from error
        self._driver, self._stream = driver, stream
        self._functions: dict[str, Any] = {}
        self._modules: dict[str, Any] = {}
        self._lock = threading.Lock()

    def _module(self, source: str) -> Any:
        if source not in self._modules:
            packaged = build.prebuilt(source)
            module = None
            if packaged:
                with contextlib.suppress(self._driver.Error):  # no machine code in it for this device and driver
                    module = self._driver.module_from_buffer(packaged)
            if module is None:
                major, minor = self._driver.Context.get_device().compute_capability()
                module = self._driver.module_from_buffer(build.compiled(source, major * 10 + minor))
            self._modules[source] = module
        return self._modules[source]

    def _function(self, kernel: str, size: int) -> Any:
        with self._lock:
            if kernel not in self._functions:
                function = self._module(build.source_of(kernel)).get_function(kernel)
                self._functions[kernel] = function.prepare([f"{size}s"])
            return self._functions[kernel]

    def launch(self, launch: Launch, stream: int) -> None:
        """See `Loader`; `stream` is 0 or the handle of the stream this loader was made for."""
        if stream and (self._stream is None or stream != self._stream.handle):
            raise BadInput("pycuda launches into its own streams only: give the stream to Pycuda(stream=...)")
        function = self._function(launch.kernel, ctypes.sizeof(launch.params))
        function.prepared_async_call(
            launch.grid, (launch.threads, 1, 1), self._stream, bytes(launch.params), shared_size=launch.shared_bytes
        )

    def wait(self, stream: int, other: int) -> None:
        """See `Loader`; pycuda knows its own streams only, so the calling thread waits for all of them."""
        self._driver.Context.synchronize()


def device_of(address: int) -> int:
    """The number of the GPU whose memory an address lies in.

    Raises:
        Unavailable: No GPU, or no driver bindings.
        PassdeployError: It lies in no GPU's.
    """
    return default_loader().device_of(address)


@cache
def default_loader(device: int | None = None) -> CudaBindings:
    """cuda-bindings, for a device's primary context or whichever is current.

    Raises:
        Unavailable: It can't be used; the message says why.
    """
    reason = unavailable()
    if reason is not None:
        raise Unavailable(reason)
    return CudaBindings(device)
