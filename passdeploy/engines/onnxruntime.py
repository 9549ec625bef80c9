"""ONNX Runtime: on a CPU with its default kernels, on an NVIDIA GPU with the CUDA provider.

The engine file is the ONNX graph itself; the session's settings are recorded beside it and applied at every load. A
graph optimised offline (`SessionOptions.optimized_model_filepath`) was measured against it on ResNet-20 at 28 px,
ResNet-18 at 64 and MobileNetV2 at 96 (30 interleaved blocks of 20 ms): same outputs bit for bit, latency within 2 %
either way, which is the noise, and a millisecond to load instead of three. But its weights are laid out for the vector
width of the machine that wrote it, and ONNX Runtime does not check that on another one; a plain graph runs anywhere.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from passdeploy.engines._common import (
    WARM_CALLS,
    check_fits,
    check_inputs,
    cpu_reason,
    facts,
    middle,
    missing,
    one_line,
    read_graph,
    run_in_batches,
)
from passdeploy.engines.base import LAYER_CALLS, Arrays, Backend, CompileInput, Engine, Runner, register
from passdeploy.errors import BadInput

if TYPE_CHECKING:
    from passdeploy.targets import Target

CPU_SETTINGS = {"session.intra_op.allow_spinning": "0", "session.inter_op.allow_spinning": "0"}
"""Spinning threads of two sessions spoil each other's latency, and burn the cores of everything else."""

CUDA = ("CUDAExecutionProvider", {"use_tf32": "0"})
"""TF32 is on by default: a float32 product would have 10 bits of mantissa."""
_KERNEL = "_kernel_time"
_SMALLEST = (
    b'\x08\x08::\n\x0c\n\x01x\x12\x01y"\x04Relu\x12\x08smallestZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01'
    b"b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\x11"
)
"""The ONNX graph ``y = Relu(x)`` of one number (opset 17), written out: bundles are served where onnx is missing."""


def session(
    data: bytes, threads: int, providers: list[Any], settings: Mapping[str, str], profile: Path | None = None
) -> Any:
    """An `onnxruntime.InferenceSession` that runs one inference at a time on `threads` threads.

    With `profile` it notes how long each layer takes, in a file whose name begins like that.

    Raises:
        BadInput: The graph can't be loaded, or the first of the providers can't be used: ONNX Runtime would go on
            without it, on the CPU.
    """
    import onnxruntime as ort

    first = providers[0] if isinstance(providers[0], str) else providers[0][0]
    if first != "CPUExecutionProvider":
        _preload()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    for key, value in settings.items():
        options.add_session_config_entry(key, value)
    try:
        loaded = ort.InferenceSession(data, options, providers=providers)
    except Exception as error:
        raise BadInput(f"onnxruntime: the graph cannot be loaded: {one_line(error)}") from None
    if loaded.get_providers()[0] != first:
        raise BadInput(f"onnxruntime: {first} could not start on this machine; see passdeploy doctor")
    return loaded


@cache
def _preload() -> None:
    """Loads the CUDA and TensorRT libraries of pip's wheels: in a process without torch, nothing else finds them.

    Where they are missing the providers do not start, which `session` reports.
    """
    import onnxruntime as ort

    if hasattr(ort, "preload_dlls"):  # onnxruntime 1.21
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Exception):  # it prints what it misses
            ort.preload_dlls()
    with contextlib.suppress(ImportError, OSError):
        importlib.import_module("tensorrt_libs")


@cache
def _starts(provider: str) -> bool:
    """Whether a provider runs here: ONNX Runtime calls those available that are compiled in, libraries there or not."""
    try:
        session(_SMALLEST, 1, [provider], {})
    except BadInput:
        return False
    return True


class OrtRunner(Runner):
    """Runs a session with inputs and outputs bound once, so that a call copies and allocates nothing.

    Args:
        loaded: The session.
        shapes: Input shapes as recorded with the engine.
        batch: Images per inference.
        device: Where inputs and outputs lie: ``cpu`` or ``cuda``.
        watched: Loads the engine again, with a profile that begins like the path given.
    """

    def __init__(
        self,
        loaded: Any,
        shapes: Mapping[str, list[int]],
        batch: int,
        device: str = "cpu",
        watched: Callable[[Path], Any] | None = None,
    ) -> None:
        self._session: Any = loaded
        self._shapes, self._batch, self._device, self._watched = shapes, batch, device, watched
        self._binding: Any = None
        self._held: Arrays = {}

    def _bind(self, inputs: Arrays) -> Any:
        import onnxruntime as ort

        binding = self._session.io_binding()
        # On a CPU an OrtValue is a view of the array, which the binding does not keep alive.
        self._held = {name: np.array(array, order="C") for name, array in inputs.items()}
        for name, array in self._held.items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array, self._device, 0))
        for output in self._session.get_outputs():
            binding.bind_output(output.name, self._device, 0)
        self._session.run_with_iobinding(binding)
        values = binding.get_outputs()
        for output, value in zip(self._session.get_outputs(), values, strict=True):
            binding.bind_ortvalue_output(output.name, value)
        return binding

    def run(self, inputs: Arrays) -> Arrays:
        check_inputs(inputs, self._shapes)
        names = [output.name for output in self._session.get_outputs()]

        def once(chunk: Arrays) -> Arrays:
            return dict(zip(names, self._session.run(names, chunk), strict=True))

        return run_in_batches(once, inputs, self._batch)

    def bind(self, inputs: Arrays) -> None:
        check_inputs(inputs, self._shapes)
        if any(len(array) != self._batch for array in inputs.values()):
            raise BadInput(f"engine: bind takes exactly {self._batch} image(s), the engine's batch")
        self._binding = self._bind(inputs)

    def call(self) -> None:
        self._session.run_with_iobinding(self._binding)

    def layer_times(self, calls: int = LAYER_CALLS) -> dict[str, float] | None:
        if self._watched is None or self._device != "cpu":  # of a GPU it notes when work is enqueued, not done
            return None
        with tempfile.TemporaryDirectory(prefix="passdeploy-profile-") as folder:
            watched = self._watched(Path(folder) / "layers")
            for _ in range(WARM_CALLS + calls):
                watched.run(None, self._held)
            events = json.loads(Path(watched.end_profiling()).read_bytes())
        taken: dict[str, list[float]] = {}
        for event in events:
            if event["cat"] == "Node" and event["name"].endswith(_KERNEL):
                name = event["name"].removesuffix(_KERNEL).removesuffix("_nchwc")
                taken.setdefault(name, []).append(event["dur"] / 1e3)
        return {name: middle(each[-calls:]) for name, each in taken.items()}

    def close(self) -> None:
        self._binding = self._session = None
        self._held = {}


@register
class OnnxRuntime(Backend):
    """ONNX Runtime's CPU or CUDA provider."""

    name: ClassVar[str] = "onnxruntime"
    suffix: ClassVar[str] = ".onnx"
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "int8", "fp16")
    provider: ClassVar[str] = CUDA[0]

    def available(self, target: Target) -> str | None:
        if target.compute_capability is None:
            return missing("onnxruntime", "onnxruntime") or cpu_reason(target, ("fp32", "int8"))
        if reason := missing("onnxruntime", "onnxruntime-gpu"):
            return reason
        import onnxruntime as ort

        if self.provider not in ort.get_available_providers():
            return f"this onnxruntime has no {self.provider}; pip install onnxruntime-gpu in place of onnxruntime"
        if target.precision not in self.precisions:
            return f"offers {', '.join(self.precisions)} on a GPU, not {target.precision}"
        return None

    def runnable(self, target: Target) -> str | None:
        if target.compute_capability is not None and not target.attached:
            return f"no {target.device} is attached to this machine"
        if reason := self.available(target):
            return reason
        if target.compute_capability is not None and not _starts(self.provider):
            return f"{self.provider} does not start here: libraries of the versions that it was built with are missing"
        return None

    def version(self) -> str:
        import importlib.metadata

        for package in ("onnxruntime", "onnxruntime-gpu"):
            try:
                return importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                continue
        return "unknown"

    def providers(self, target: Target) -> list[Any]:
        """Execution providers in order of preference, with their options."""
        if target.compute_capability is None:
            return ["CPUExecutionProvider"]
        return [CUDA]

    def provider_names(self, target: Target) -> list[str]:
        """`providers` without their options, as an engine records them."""
        return [given if isinstance(given, str) else given[0] for given in self.providers(target)]

    def compile(self, source: CompileInput, target: Target) -> Engine:
        graph = read_graph(source, target)
        data, needs = graph.data, {}
        if target.precision == "int8":
            from passdeploy.engines._quantize import for_cpu, for_tensorrt, quantize

            recipe = for_cpu() if target.compute_capability is None else for_tensorrt()
            data, needs = quantize(source, recipe), {"cpu_flags_any": list(recipe.cpu_flags_any)}
        elif target.precision == "fp16":
            from passdeploy.engines._convert import to_half

            data = to_half(data, "fp16")
        meta = facts(target, self.version(), graph, source) | {
            "threads": target.threads,
            "providers": self.provider_names(target),
            "session": dict(CPU_SETTINGS),
            **needs,
        }
        return Engine(self.name, data, self.suffix, meta)

    def runner(self, engine: Engine, target: Target) -> Runner:
        check_fits(engine, target, self.name, settings=("threads",))
        made, here = engine.meta["providers"], self.provider_names(target)
        if made != here:
            raise BadInput(
                f"engine: compiled for {made[0]}, and {target.name} runs {here[0]}; compile it again for this target"
            )
        on_gpu = target.compute_capability is not None
        settings = engine.data, target.threads, self.providers(target), engine.meta["session"]
        loaded = session(*settings)
        return OrtRunner(
            loaded,
            engine.meta["inputs"],
            target.batch,
            "cuda" if on_gpu else "cpu",
            watched=lambda profile: session(*settings, profile=profile),
        )
