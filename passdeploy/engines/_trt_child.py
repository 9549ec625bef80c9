"""The child process in which TensorRT and TensorRT-RTX build and run, through Polygraphy.

``python -m passdeploy.engines._trt_child JOB.json RESULT.json PARENT`` builds; with a file descriptor alone it serves
a `passdeploy.engines._child.Server`. ``POLYGRAPHY_USE_TENSORRT_RTX`` in its environment says which of the two it is.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from passdeploy.engines._child import answer_job, serve
from passdeploy.engines._common import WARM_CALLS, one_line
from passdeploy.engines._timings import keep, own_copy
from passdeploy.engines._trt_context import context_of
from passdeploy.errors import BadInput

RTX = os.environ.get("POLYGRAPHY_USE_TENSORRT_RTX") == "1"
NAME = "TensorRT-RTX" if RTX else "TensorRT"


def _library() -> Any:
    if RTX:
        import tensorrt_rtx as trt
    else:
        import tensorrt as trt
    return trt


def _config(job: dict[str, Any]) -> Any:
    from polygraphy.backend.trt import CreateConfig, Profile

    trt, options = _library(), job["options"]
    common: dict[str, Any] = {"profiling_verbosity": trt.ProfilingVerbosity.DETAILED}
    dynamic = {name: shape for name, shape in job["inputs"].items() if -1 in shape}
    if dynamic:
        profile = Profile()
        for name, shape in dynamic.items():
            low, best, high = ([n if axis < 0 else axis for axis in shape] for n in job["batches"])
            profile.add(name, min=tuple(low), opt=tuple(best), max=tuple(high))
        common["profiles"] = [profile]
    if options.get("optimization_level") is not None:
        common["builder_optimization_level"] = options["optimization_level"]
    if RTX:
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

        if job["compute_capabilities"] == "current":
            return CreateConfigRTX(use_gpu=True, **common)
        if job["compute_capabilities"] is None:  # whatever the library does when it is not told
            return CreateConfigRTX(**common)
        return CreateConfigRTX(compute_capabilities=[tuple(c) for c in job["compute_capabilities"]], **common)
    if options.get("version_compatible"):
        common["version_compatible"] = True
    if options.get("hardware_compatible"):
        common["hardware_compatibility_level"] = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if options.get("timing_cache"):
        common["load_timing_cache"] = own_copy(options["timing_cache"], Path(job["engine"]).parent)
    return CreateConfig(**common)


def build(job: dict[str, Any]) -> dict[str, Any]:
    """Builds an engine from ``job["onnx"]`` into ``job["engine"]``; returns facts about it."""
    from polygraphy.backend.trt import EngineBytesFromNetwork, NetworkFromOnnxPath, PostprocessConfig

    trt = _library()
    flags: dict[str, Any] = {}
    used: list[Any] = []

    def settled(builder: Any, network: Any, config: Any) -> None:
        """Clears TF32, which is on by default and leaves a float32 product 10 bits of mantissa.

        TensorRT-RTX promises that an engine's launches can be captured in a graph only if it allocates nothing itself.
        """
        config.clear_flag(trt.BuilderFlag.TF32)
        if RTX and hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
            config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        flags["tf32"] = bool(config.get_flag(trt.BuilderFlag.TF32))
        used.append(config)

    if job.get("plugin_for") is not None and not RTX:
        from passdeploy.engines._trt_plugin import register

        register(job["plugin_for"])
    begun = time.perf_counter()
    typed = {"strongly_typed": True} if hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED") else {}
    network = NetworkFromOnnxPath(job["onnx"], **typed)
    cache = (job["options"].get("timing_cache") or None) if not RTX else None
    config = PostprocessConfig(_config(job), settled)
    data = EngineBytesFromNetwork(network, config=config)()
    Path(job["engine"]).write_bytes(bytes(data))
    seconds = time.perf_counter() - begun
    remark = keep(used[0], cache) if cache else None
    return {"library": trt.__version__, "seconds": seconds, "remark": remark, **flags}


class _Loaded:
    """One engine with its context, buffers and captured graph."""

    def __init__(self, data: bytes, batch: int, host_code: bool = False) -> None:
        from passdeploy.engines._cuda import Buffer, Stream, check

        trt = _library()
        from cuda.bindings import runtime

        check(runtime.cudaGetDeviceCount())  # a clear error before the library's own
        self._log = trt.Logger(trt.Logger.ERROR)
        self._runtime = trt.Runtime(self._log)
        if host_code:  # of a version-compatible engine's lean runtime; its digest has been checked
            self._runtime.engine_host_code_allowed = True
        self.engine = self._runtime.deserialize_cuda_engine(data)
        if self.engine is None:
            raise BadInput(
                f"the engine does not fit this GPU or this {NAME} {trt.__version__}; compile it again on this machine"
            )
        self.context = context_of(trt, self.engine)
        self.stream = Stream()
        self.inputs: dict[str, Buffer] = {}
        self.outputs: dict[str, Buffer] = {}
        try:
            self._allocate(trt, batch)
        except BaseException:
            self.close()  # this process goes on, with other engines on the same GPU
            raise
        self.graphed = False
        self.refused = ""
        self._bound: dict[str, np.ndarray] = {}
        self._launch = self._enqueue

    def _allocate(self, trt: Any, batch: int) -> None:
        from passdeploy.engines._cuda import Buffer

        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        for name in names:
            if self.engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
                shape = tuple(batch if axis < 0 else axis for axis in self.engine.get_tensor_shape(name))
                if not self.context.set_input_shape(name, shape):
                    raise BadInput(f"the engine does not take {name} of shape {list(shape)}")
                self.inputs[name] = Buffer(shape, trt.nptype(self.engine.get_tensor_dtype(name)))
        for name in names:
            if name not in self.inputs:
                shape = tuple(self.context.get_tensor_shape(name))
                self.outputs[name] = Buffer(shape, trt.nptype(self.engine.get_tensor_dtype(name)))
        for name, buffer in {**self.inputs, **self.outputs}.items():
            self.context.set_tensor_address(name, buffer.pointer)

    def _enqueue(self) -> None:
        if not self.context.execute_async_v3(int(self.stream.handle)):
            raise BadInput(f"{NAME} could not enqueue the inference")

    def bind(self, inputs: dict[str, np.ndarray]) -> bool:
        """Puts inputs in place and captures the inference as a CUDA graph; returns whether the engine allows that."""
        self._bound = inputs
        for name, buffer in self.inputs.items():
            buffer.write(inputs[name], self.stream.handle)
        self._enqueue()  # the first enqueue may allocate, which a capture must not see
        self.stream.synchronise()
        if not self.graphed:
            self._capture()
        return self.graphed

    def _capture(self) -> None:
        """Replays a graph from now on; where the engine can't be captured, `refused` says why, and it is enqueued.

        Raises:
            BadInput: Nor can it be enqueued after the attempt.
        """
        capturable = getattr(self.context, "is_stream_capturable", lambda stream: True)  # TensorRT-RTX can tell
        if not capturable(int(self.stream.handle)):
            self.refused = f"{NAME} says that it allocates as it runs"
            return
        try:
            self._launch = self.stream.capture(self._enqueue)
            self.graphed = True
        except Exception as error:  # data-dependent control flow
            self.refused = one_line(error)
            self._enqueue()  # what is wrong with more than the capture shows here, not between timed blocks
            self.stream.synchronise()

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        for name, buffer in self.inputs.items():
            buffer.write(inputs[name], self.stream.handle)
        self._enqueue()
        return {name: buffer.read(self.stream.handle) for name, buffer in self.outputs.items()}

    def call(self) -> None:
        """One inference on what is bound."""
        self._launch()
        self.stream.synchronise()

    def block(self, seconds: float, calls: int) -> list[tuple[float, float]]:
        """(device, host enqueue) seconds of at least `calls` inferences over at least `seconds`.

        The first one finds cold caches and is not counted.
        """
        self.call()
        taken: list[tuple[float, float]] = []
        begun = time.perf_counter()
        while len(taken) < calls or time.perf_counter() - begun < seconds:
            taken.append(self.stream.timed(self._launch))
        return taken

    def end_to_end_block(self, seconds: float, calls: int) -> list[float]:
        """Seconds of inferences with their transfers: images to the device, outputs back to the host.

        The first one finds cold caches and is not counted.
        """

        def transfer_and_call() -> None:
            for name, buffer in self.inputs.items():
                buffer.write(self._bound[name], self.stream.handle)
            self._launch()
            for buffer in self.outputs.values():
                buffer.read(self.stream.handle)

        transfer_and_call()
        taken: list[float] = []
        begun = time.perf_counter()
        while len(taken) < calls or time.perf_counter() - begun < seconds:
            start = time.perf_counter()
            transfer_and_call()
            taken.append(time.perf_counter() - start)
        return taken

    def layers(self) -> Any:
        """What the engine inspector tells about each layer."""
        trt = _library()
        inspector = self.engine.create_engine_inspector()
        inspector.execution_context = self.context
        return json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON))

    def layer_times(self, calls: int) -> dict[str, float]:
        """Mean milliseconds per layer (TensorRT's profiler; slower than the engine is without it)."""
        trt = _library()

        class Times(trt.IProfiler):  # type: ignore[misc, name-defined]
            """Sums up what is reported."""

            def __init__(self) -> None:
                super().__init__()
                self.total: dict[str, float] = {}

            def report_layer_time(self, name: str, milliseconds: float) -> None:
                self.total[name] = self.total.get(name, 0.0) + milliseconds

        times = Times()
        context = context_of(trt, self.engine)
        for name, buffer in {**self.inputs, **self.outputs}.items():
            if name in self.inputs:
                context.set_input_shape(name, buffer.shape)
            context.set_tensor_address(name, buffer.pointer)
        for call in range(WARM_CALLS + calls):
            if call == WARM_CALLS:
                context.profiler = times
            if not context.execute_async_v3(int(self.stream.handle)):
                raise BadInput("the engine could not be enqueued to time its layers")
            self.stream.synchronise()
        return {name: total / calls for name, total in times.total.items()}

    def close(self) -> None:
        for buffer in (*self.inputs.values(), *self.outputs.values()):
            buffer.free()
        self.stream.free()
        self.context = self.engine = self._runtime = None


def _verbs() -> dict[str, Any]:
    loaded: dict[int, _Loaded] = {}

    def load(path: str, batch: int, host_code: bool = False) -> int:
        key = max(loaded, default=-1) + 1
        loaded[key] = _Loaded(Path(path).read_bytes(), batch, host_code)
        return key

    return {
        "load": load,
        "bind": lambda key, inputs: (loaded[key].bind(inputs), loaded[key].refused),
        "run": lambda key, inputs: loaded[key].run(inputs),
        "call": lambda key: loaded[key].call(),
        "block": lambda key, seconds, calls: loaded[key].block(seconds, calls),
        "end_to_end_block": lambda key, seconds, calls: loaded[key].end_to_end_block(seconds, calls),
        "layers": lambda key: loaded[key].layers(),
        "layer_times": lambda key, calls: loaded[key].layer_times(calls),
        "close": lambda key: loaded.pop(key).close(),
    }


if __name__ == "__main__":
    if len(sys.argv) == 2:
        serve(int(sys.argv[1]), _verbs())
    else:
        answer_job(build)
