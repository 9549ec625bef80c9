"""OpenVINO on a CPU.

The engine file is the ONNX graph; the compile settings are recorded beside it and applied at every load. OpenVINO's
own blob was measured against it (ResNet-20 at 28 px, ResNet-18 at 64; 30 interleaved blocks of 20 ms): same outputs
bit for bit, latency within 3 %, the same time to load. A blob is tied to one OpenVINO release; the graph is not.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Mapping
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


def settings(threads: int) -> dict[str, Any]:
    """Compile settings: one stream for the lowest latency, and float32 arithmetic.

    Without the precision hint OpenVINO silently computes a float32 graph in bfloat16 where the CPU has it.
    """
    return {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,
    }


class OpenVinoRunner(Runner):
    """Runs one infer request.

    Args:
        compiled: An `openvino.CompiledModel`.
        shapes: Input shapes as recorded with the engine.
        batch: Images per inference.
        watched: Compiles the graph again, with the counters of its layers on.
    """

    def __init__(
        self, compiled: Any, shapes: Mapping[str, list[int]], batch: int, watched: Callable[[], Any] | None = None
    ) -> None:
        self._compiled: Any = compiled
        self._request: Any = compiled.create_infer_request()
        self._shapes, self._batch, self._watched = shapes, batch, watched
        self._bound: dict[str, np.ndarray] = {}

    def run(self, inputs: Arrays) -> Arrays:
        check_inputs(inputs, self._shapes)

        def once(chunk: Arrays) -> Arrays:
            results = self._compiled(chunk)
            return {output.get_any_name(): np.array(results[output]) for output in self._compiled.outputs}

        return run_in_batches(once, inputs, self._batch)

    def bind(self, inputs: Arrays) -> None:
        import openvino as ov

        check_inputs(inputs, self._shapes)
        if any(len(array) != self._batch for array in inputs.values()):
            raise BadInput(f"engine: bind takes exactly {self._batch} image(s), the engine's batch")
        self._bound = {name: np.array(array, order="C") for name, array in inputs.items()}
        for name, array in self._bound.items():
            self._request.set_tensor(name, ov.Tensor(array, shared_memory=True))

    def call(self) -> None:
        self._request.infer(share_outputs=True)

    def layer_times(self, calls: int = LAYER_CALLS) -> dict[str, float] | None:
        if self._watched is None:
            return None
        request = self._watched().create_infer_request()
        taken: dict[str, list[float]] = {}
        for call in range(WARM_CALLS + calls):
            request.infer(self._bound, share_inputs=True)
            for layer in request.profiling_info if call >= WARM_CALLS else ():
                if not layer.real_time:  # optimised away
                    continue
                # A change of layout is named after the layer that it is for, whose time it is not.
                name = layer.node_name if layer.node_type != "Reorder" else layer.node_name.replace("/", " ")
                taken.setdefault(name, []).append(1e3 * layer.real_time.total_seconds())
        return {name: middle(each) for name, each in taken.items()}

    def close(self) -> None:
        self._request = self._compiled = None
        self._bound = {}


@register
class OpenVino(Backend):
    """OpenVINO's CPU plugin."""

    name: ClassVar[str] = "openvino"
    suffix: ClassVar[str] = ".onnx"
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "int8")

    def available(self, target: Target) -> str | None:
        if target.compute_capability is not None:
            return "OpenVINO compiles for CPUs here, not for NVIDIA GPUs"
        return missing("openvino", "openvino") or cpu_reason(target, self.precisions)

    def version(self) -> str:
        import importlib.metadata

        try:
            return importlib.metadata.version("openvino")
        except importlib.metadata.PackageNotFoundError:
            return "unknown"

    def compile(self, source: CompileInput, target: Target) -> Engine:
        graph = read_graph(source, target)
        data, needs = graph.data, {}
        if target.precision == "int8":
            from passdeploy.engines._quantize import for_cpu, quantize

            recipe = for_cpu()
            data, needs = quantize(source, recipe), {"cpu_flags_any": list(recipe.cpu_flags_any)}
        meta = facts(target, self.version(), graph, source) | {
            "threads": target.threads,
            "settings": settings(target.threads),
            **needs,
        }
        return Engine(self.name, data, self.suffix, meta)

    def runner(self, engine: Engine, target: Target) -> Runner:
        check_fits(engine, target, self.name, settings=("threads",))
        core = _core()
        try:
            model = core.read_model(io.BytesIO(engine.data))
            compiled = core.compile_model(model, "CPU", engine.meta["settings"])
        except Exception as error:
            raise BadInput(f"openvino: the graph cannot be loaded: {one_line(error)}") from None
        counting = {**engine.meta["settings"], "PERF_COUNT": True}
        return OpenVinoRunner(
            compiled,
            engine.meta["inputs"],
            target.batch,
            lambda: core.compile_model(_by_node(model, engine.data), "CPU", counting),
        )


@functools.cache
def _core() -> Any:
    """The one core of this process, which stays.

    Each core moves the alternate signal stack and puts back, when it goes, the one that it found: of two cores, the
    first to go leaves a stack of freed memory behind, and Ctrl-C is a segmentation fault (OpenVINO 2026.4 on Linux).
    """
    import openvino as ov

    return ov.Core()


def _by_node(model: Any, graph: bytes) -> Any:
    """The model with operations named after the graph's nodes: OpenVINO names them after what they compute."""
    import onnx

    names = {output: node.name for node in onnx.load_model_from_string(graph).graph.node for output in node.output}
    for operation in model.get_ops():
        name = operation.get_friendly_name().removesuffix("/WithoutBiases")
        if name in names:
            operation.set_friendly_name(names[name])
    return model
