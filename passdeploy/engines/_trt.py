"""What TensorRT and TensorRT-RTX share: both are driven through Polygraphy in a child process.

A layer's precision comes from the ONNX graph (their networks are strongly typed), so that is converted or quantised
first.

Not run so far, for want of a GPU and of the full TensorRT libraries: the runner beyond its refusals, and every build of
the full TensorRT. TensorRT-RTX builds run in the tests.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from passdeploy.engines._child import Server, run_job
from passdeploy.engines._common import (
    PLAINLY,
    check_fits,
    check_inputs,
    facts,
    missing,
    read_graph,
    run_in_batches,
    say_once,
)
from passdeploy.engines.base import LAYER_CALLS, Arrays, Backend, CompileInput, Engine, Runner, require
from passdeploy.errors import BadInput, PassdeployError, Unavailable

if TYPE_CHECKING:
    import numpy as np

    from passdeploy.targets import Target

CHILD = "passdeploy.engines._trt_child"
LOWEST: Mapping[str, tuple[int, int]] = {"bf16": (8, 0), "fp8": (8, 9)}
"""The first compute capability whose tensor cores take a precision (fp32, fp16 and int8: all that are supported)."""


AMPERE = (8, 0)
"""The first compute capability on which a hardware-compatible engine runs."""


@dataclass(frozen=True)
class Options:
    """Build options beyond the target.

    Attributes:
        optimization_level: 0 to 5; None: the library's default.
        max_batch: Largest batch of a graph with a dynamic batch axis; None: the target's.
        version_compatible: Runs on later TensorRT versions, too, and brings host code along for that: TensorRT's lean
            runtime (full TensorRT only).
        hardware_compatible: Runs on every GPU from Ampere on, somewhat slower (full TensorRT only).
        timing_cache: File of kernel timings that builds share (full TensorRT only); None: in the user's cache folder;
            empty: none.
    """

    optimization_level: int | None = None
    max_batch: int | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    timing_cache: str | None = None


def capabilities(target: Target) -> list[tuple[int, int]]:
    """The compute capabilities that a target names: ``"8.0"``, or several with commas.

    Raises:
        BadInput: Something else than major.minor.
    """
    try:
        pairs = [c.strip().split(".") for c in (target.compute_capability or "").split(",")]
        return [(int(major), int(minor)) for major, minor in pairs]
    except ValueError:
        raise BadInput(
            f"compute capability {target.compute_capability!r}: expected major.minor such as 8.0, several with commas"
        ) from None


def _numbers(version: str) -> list[int]:
    """``11.0.0.114`` as something that can be compared."""
    return [int(part) for part in version.split(".") if part.isdigit()]


class TrtRunner(Runner):
    """An engine in the serving child; offers `block` because the GPU's own clock is the one to believe.

    Args:
        server: Shared by all runners of a backend, so that compared engines take turns on one GPU context.
        release: Called on close.
        engine: The file's bytes.
        shapes: Input shapes as recorded with the engine.
        batch: Images per inference.
        host_code: The engine brings a runtime of its own and may run it: a version-compatible one's.
    """

    def __init__(
        self,
        server: Server,
        release: Any,
        data: bytes,
        shapes: Mapping[str, list[int]],
        batch: int,
        host_code: bool = False,
    ) -> None:
        self._server, self._release, self._shapes, self._batch = server, release, shapes, batch
        self.graphed = False
        self.enqueued: list[float] = []
        self._key: int | None = None
        try:
            with tempfile.NamedTemporaryFile(prefix="passdeploy-engine-") as file:
                file.write(data)
                file.flush()
                self._key = server.ask("load", file.name, batch, host_code)
        except BaseException:  # a full disk's, too
            release()
            raise

    def run(self, inputs: Arrays) -> Arrays:
        check_inputs(inputs, self._shapes)
        return run_in_batches(lambda chunk: self._server.ask("run", self._key, chunk), inputs, self._batch)

    def bind(self, inputs: dict[str, np.ndarray]) -> None:
        check_inputs(inputs, self._shapes)
        if any(len(array) != self._batch for array in inputs.values()):
            raise BadInput(f"engine: bind takes exactly {self._batch} image(s), the batch it runs with")
        self.graphed, refused = self._server.ask("bind", self._key, inputs)
        if not self.graphed:
            say_once(PLAINLY.format(self._server.who, refused))

    def call(self) -> None:
        self._server.ask("call", self._key)

    def block(self, seconds: float, calls: int) -> list[float]:
        """Device seconds of each of a block of inferences: CUDA events round the replay of a CUDA graph.

        Where the engine can't be captured as a graph (`graphed` is False after `bind`), round plain enqueues.
        `enqueued` then holds what each of them took the host.
        """
        taken = self._server.ask("block", self._key, seconds, calls)
        self.enqueued = [host for _, host in taken]
        return [device for device, _ in taken]

    def end_to_end_block(self, seconds: float, calls: int) -> list[float]:
        """Seconds of each of a block of inferences with their transfers, on the host's clock."""
        taken: list[float] = self._server.ask("end_to_end_block", self._key, seconds, calls)
        return taken

    def layers(self) -> Any:
        """The engine inspector's description of every layer."""
        return self._server.ask("layers", self._key)

    def layer_times(self, calls: int = LAYER_CALLS) -> dict[str, float]:
        """Mean milliseconds per layer; their sum exceeds the latency, since profiling takes the layers apart."""
        times: dict[str, float] = self._server.ask("layer_times", self._key, calls)
        return times

    def close(self) -> None:
        if self._key is None:
            return
        try:
            self._server.ask("close", self._key)
        except PassdeployError:
            pass  # its process is gone already, and the engine with it
        finally:
            self._key = None
            self._release()


class TrtBackend(Backend):
    """TensorRT or TensorRT-RTX; subclasses say which."""

    title: ClassVar[str]
    module: ClassVar[str]
    install: ClassVar[str]
    environment: ClassVar[dict[str, str]]
    options: Options = Options()
    _server: Server | None = None

    def reason(self, target: Target) -> str | None:
        """What the subclass has against the target; None: nothing."""
        raise NotImplementedError

    def job(self, target: Target) -> dict[str, Any]:
        """What the subclass adds to a build job."""
        raise NotImplementedError

    def available(self, target: Target) -> str | None:
        if target.compute_capability is None:
            return f"{self.title} compiles for NVIDIA GPUs, not for a CPU"
        if reason := missing(self.module, self.install) or missing("polygraphy", "polygraphy"):
            return reason
        if target.precision not in self.precisions:
            return f"{target.precision} is not offered; known: {', '.join(self.precisions)}"
        lowest = LOWEST.get(target.precision, (0, 0))
        if any(capability < lowest for capability in capabilities(target)):
            return (
                f"{target.precision} needs compute capability {lowest[0]}.{lowest[1]} or newer, "
                f"{target.name} has {target.compute_capability}; use --precision fp16"
            )
        return self.reason(target)

    def runnable(self, target: Target) -> str | None:
        if not target.attached:
            return f"no {target.device} is attached to this machine, so its engine can be compiled but not run"
        return self.available(target) or missing("cuda.bindings", "cuda-bindings")

    def version(self) -> str:
        import importlib.metadata

        for package in self.install.split():
            try:
                return importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                continue
        return "unknown"

    def graph_for(self, source: CompileInput, target: Target) -> bytes:
        """The ONNX graph in the target's precision: what the builder reads, and what stands in for its accuracy."""
        from passdeploy.engines._convert import check_range

        data = read_graph(source, target).data
        graph = self.convert(data, source, target)
        if source.samples is not None:
            check_range(data, graph, source.samples)
        return graph

    def convert(self, data: bytes, source: CompileInput, target: Target) -> bytes:
        """Changes a float32 graph to the target's precision; `source` has the images that int8 is calibrated on."""
        from passdeploy.engines._convert import to_half
        from passdeploy.engines._quantize import for_tensorrt, for_tensorrt_fp8, quantize

        if target.precision in ("int8", "fp8"):  # what is not quantised runs in fp16
            recipe = for_tensorrt() if target.precision == "int8" else for_tensorrt_fp8()
            return to_half(quantize(source, recipe), "fp16")
        return data if target.precision == "fp32" else to_half(data, target.precision)

    def compile(self, source: CompileInput, target: Target, options: Options | None = None) -> Engine:
        require(self, target)
        options = options or self.options
        graph = read_graph(source, target)
        largest = max(target.batch, options.max_batch or target.batch)
        plugin = source.masked and self.masks_by_kernel(target)
        with tempfile.TemporaryDirectory(prefix="passdeploy-trt-") as folder:
            onnx_path, engine_path = Path(folder, "model.onnx"), Path(folder, "engine")
            onnx_path.write_bytes(self.convert(graph.data, source, target))
            job = {
                "onnx": str(onnx_path),
                "engine": str(engine_path),
                "inputs": graph.inputs,
                "batches": [1, target.batch, largest],
                "options": asdict(options),
                "plugin_for": next(10 * a + b for a, b in capabilities(target)) if plugin else None,
                **self.job(target),
            }
            built = run_job(CHILD, job, f"{self.title}: build for {target.name} failed", env=self.environment)
            data = engine_path.read_bytes()
        if remark := built.get("remark"):
            say_once(f"{self.title}: {remark}")
        meta = facts(target, built["library"], graph, source) | {
            "compute_capabilities": [f"{a}.{b}" for a, b in capabilities(target)],
            "build_s": round(built["seconds"], 3),
            "options": asdict(replace(options, timing_cache=None)),  # that is a path, which tells its user's name
            "max_batch": largest,
            "tf32": built["tf32"],
        }
        return Engine(self.name, data, self.suffix, meta)

    def runner(self, engine: Engine, target: Target) -> Runner:
        check_fits(engine, target, self.name)
        options = engine.meta["options"]
        made, asked = engine.meta["compute_capabilities"], target.compute_capability
        newer = options["hardware_compatible"] and min(capabilities(target)) >= AMPERE
        if asked not in made and not newer:
            raise BadInput(
                f"engine: compiled for compute capability {', '.join(made)}, {target.name} has {asked}; "
                f"compile it again with --target {target.name}"
            )
        version, here = engine.meta["version"], self.version()
        if version != here and not (options["version_compatible"] and _numbers(here) >= _numbers(version)):
            raise BadInput(
                f"engine: made by {self.title} {version}, this machine has {here}; "
                f"compile it again, or install {self.title} {version}"
            )
        if reason := self.runnable(target):
            raise Unavailable(f"{self.title}: {reason}")
        if self._server is None:
            self._server = Server(CHILD, self.title, self.environment)
        self._server.users += 1
        host_code = bool(options["version_compatible"])
        return TrtRunner(self._server, self._let_go, engine.data, engine.meta["inputs"], target.batch, host_code)

    def _let_go(self) -> None:
        if self._server is not None:
            self._server.users -= 1
            if self._server.users == 0:
                self._server.stop()
                self._server = None
