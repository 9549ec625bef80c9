"""AOTInductor packages: preparing the exported program, running the compiled package.

Shared by `inductor` and `torch_tensorrt`, whose packages load the same way.
"""

from __future__ import annotations

import contextlib
import copy
import glob
import tempfile
import time
import zipfile
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from passdeploy.engines._common import PLAINLY, check_inputs, one_line, run_in_batches, say_once, told
from passdeploy.engines.base import Arrays, CompileInput, Engine, Runner
from passdeploy.errors import BadInput
from passdeploy.tf32 import single_means_single

if TYPE_CHECKING:
    import torch

VECTOR_FLAGS = ("avx", "avx2", "fma", "f16c", "amx_", "avx512", "avx_vnni", "asimd", "sve")
"""CPU features (by beginning) that compiled code may use without asking."""


def cpu_flags() -> list[str]:
    """The vector features of this CPU, as Linux names them; empty where it does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    found = next((line.split(":", 1)[1].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return sorted(flag for flag in found if flag.startswith(VECTOR_FLAGS))


def check_machine(engine: Engine, backend: str) -> None:
    """Refuses native code that was compiled for another PyTorch or for a CPU with features that this one lacks.

    Raises:
        BadInput: Says which, and the fix.
    """
    import torch

    made, here = str(engine.meta["version"]), torch.__version__
    if made.split("+")[0] != here.split("+")[0]:
        raise BadInput(f"{backend}: the package was made by PyTorch {made}, this is {here}; compile it again here")
    lacking = sorted(set(engine.meta.get("cpu_flags", ())) - set(cpu_flags()))
    if lacking:
        raise BadInput(f"{backend}: the package uses {', '.join(lacking)}, which this CPU lacks; compile it again here")


def drop_copies(package: Path) -> None:
    """Removes what a package holds from the cache of the inductor that made it: libraries with all weights in them.

    Nothing reads them again, and a run that profiles builds a package for each of a hundred structures. What another
    process has linked under the same name since is left to it.

    Args:
        package: The file as it was written; loading one unpacks it anew.
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    with contextlib.suppress(OSError, zipfile.BadZipFile):
        with zipfile.ZipFile(package) as archive:
            names = {PurePosixPath(member).name for member in archive.namelist()}
        for name in (glob.escape(name) for name in names if name.endswith(".wrapper.so")):
            cache = Path(cache_dir())
            # A build that may use no cache has one of its own there, which stays as well.
            for found in [*cache.glob(f"*/{name}"), *cache.glob(f"*/*/{name}")]:
                if found.stat().st_mtime_ns <= package.stat().st_mtime_ns:
                    found.unlink()


def prepare(source: CompileInput, precision: str, device: str) -> torch.export.ExportedProgram:
    """The exported program on `device` in `precision`, with float32 inputs and outputs.

    Args:
        source: Its `exported_program` is needed, and left as it is.
        precision: ``fp32``, ``fp16`` or ``bf16``.
        device: ``cpu`` or ``cuda``.

    Raises:
        BadInput: There is no exported program.
    """
    import torch

    program = source.exported_program
    if program is None:
        raise BadInput("this backend compiles from torch.export, and the model was not exported that way; see --debug")
    program = copy.deepcopy(program)  # what follows changes devices and types in place
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    _forget_recorded_types(program, dtype)
    if device != "cpu":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, device)
    if precision == "fp32":
        return program
    arguments = program.example_inputs[0] if program.example_inputs else None
    if arguments is None:
        raise BadInput("the exported program carries no example inputs; export the model again")

    class Half(torch.nn.Module):
        """Casts at both ends; convolutions in channels-last, which is what tensor cores read."""

        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            x = images.to(dtype, memory_format=torch.channels_last)
            result: torch.Tensor = self.inner(x).float()
            return result

    module = program.module().to(dtype)
    with torch.no_grad():
        return torch.export.export(Half(module), tuple(a.to(device) for a in arguments))


def _forget_recorded_types(program: torch.export.ExportedProgram, dtype: torch.dtype) -> None:
    """Takes back what the export wrote down about types and devices, in place, since `prepare` changes both.

    `torch.export` asserts before every ``.to`` what type and device its input had. And a cast is written down with the
    type that it led to: where the network is computed in half precision, float32 there means half, as `to_half` has it
    for ONNX. Only passdeploy's own operators want their float32 arguments at any precision.

    Args:
        program: Changed.
        dtype: What takes the place of float32.
    """
    import torch

    def taken(value: Any) -> Any:
        return dtype if value is torch.float32 else value

    for module in program.graph_module.modules():
        if not isinstance(module, torch.fx.GraphModule):
            continue
        asserts = torch.ops.aten._assert_tensor_metadata.default
        for node in module.graph.find_nodes(op="call_function", target=asserts):
            module.graph.erase_node(node)
        for node in module.graph.nodes:
            users = [str(user.target) for user in node.users]
            if node.op == "call_function" and not any(name.startswith("passdeploy.") for name in users):
                node.args = torch.fx.node.map_aggregate(node.args, taken)  # type: ignore[assignment]
                node.kwargs = torch.fx.node.map_aggregate(node.kwargs, taken)  # type: ignore[assignment]
        module.recompile()


class AotiRunner(Runner):
    """Runs a package on the CPU, in this process.

    PyTorch has one thread count per process: the first open runner sets it, and the last one puts it back on close.

    Args:
        data: The package's bytes, already checked.
        meta: As recorded with the engine.
        threads: CPU threads.

    Raises:
        BadInput: The package can't be loaded, or a runner with another number of threads is open.
    """

    device = "cpu"
    _open: ClassVar[list[int]] = []
    """Threads of each open runner."""
    _before: ClassVar[int] = 0
    """Threads of the process while none is open."""

    def __init__(self, data: bytes, meta: Mapping[str, Any], threads: int) -> None:
        import torch
        from torch._inductor import aoti_load_package

        self._torch, self._meta, self._batch = torch, meta, int(meta["batch"])
        self._outputs = list(meta["outputs"])
        self._bound: list[Any] = []
        if AotiRunner._open and threads not in AotiRunner._open:
            raise BadInput(
                f"inductor: an engine for {AotiRunner._open[0]} thread(s) is loaded, and PyTorch has one number of "
                f"threads per process; compile both for as many, or run the one for {threads} by itself"
            )
        with tempfile.TemporaryDirectory(prefix="passdeploy-aoti-") as folder:
            path = Path(folder, "model.pt2")
            path.write_bytes(data)
            try:
                self._model: Any = aoti_load_package(str(path), run_single_threaded=True)
            except Exception as error:
                raise BadInput(f"the AOTInductor package cannot be loaded: {one_line(error)}") from None
        if not AotiRunner._open:
            AotiRunner._before = torch.get_num_threads()
            torch.set_num_threads(threads)
        AotiRunner._open.append(threads)
        self._threads: int | None = threads

    def _tensors(self, inputs: Arrays) -> list[Any]:
        arrays = [np.ascontiguousarray(inputs[name]) for name in self._meta["inputs"]]
        return [self._torch.from_numpy(array).to(self.device, copy=True) for array in arrays]

    def run(self, inputs: Arrays) -> Arrays:
        check_inputs(inputs, self._meta["inputs"])

        def once(chunk: Arrays) -> Arrays:
            with self._torch.inference_mode(), told("the AOTInductor package"):
                results = self._model(*self._tensors(chunk))
            results = results if isinstance(results, (tuple, list)) else (results,)
            return {name: value.cpu().numpy() for name, value in zip(self._outputs, results, strict=True)}

        return run_in_batches(once, inputs, self._batch)

    def bind(self, inputs: Arrays) -> None:
        check_inputs(inputs, self._meta["inputs"])
        if any(len(array) != self._batch for array in inputs.values()):
            raise BadInput(f"engine: bind takes exactly {self._batch} image(s), the engine's batch")
        with told("the AOTInductor package"):
            self._bound = self._tensors(inputs)

    def call(self) -> None:
        self._model(*self._bound)

    def close(self) -> None:
        if self._threads is not None:
            AotiRunner._open.remove(self._threads)
            self._threads = None
            if not AotiRunner._open:
                self._torch.set_num_threads(AotiRunner._before)
        self._model, self._bound = None, []


class CudaAotiRunner(AotiRunner):
    """Runs a package on the GPU as a replayed CUDA graph, timed with events. Not run so far, for want of a GPU.

    What can't be captured, since it waits for the GPU or allocates beside PyTorch, is launched kernel by kernel.
    """

    device = "cuda"
    _graph: Any = None
    """None: the package is launched plainly."""
    _results: Any = None
    """Kept: the graph writes there."""

    def run(self, inputs: Arrays) -> Arrays:
        with single_means_single():
            return super().run(inputs)

    def bind(self, inputs: Arrays) -> None:
        super().bind(inputs)
        cuda = self._torch.cuda
        side = cuda.Stream()
        side.wait_stream(cuda.current_stream())
        with single_means_single():
            # A capture needs everything allocated and tuned before it.
            with cuda.stream(side), told("the AOTInductor package"):
                for _ in range(3):
                    self._model(*self._bound)
            side.synchronize()
            graph = cuda.CUDAGraph()
            self._graph = self._results = None
            try:
                # Within the stream that is current: where a capture fails, its own one would stay so.
                with cuda.stream(cuda.current_stream()), cuda.graph(graph):
                    self._results = self._model(*self._bound)
                self._graph = graph
            except RuntimeError as error:
                self._results = None
                say_once(PLAINLY.format("the AOTInductor package", one_line(error.__context__ or error)))
                with told("the AOTInductor package"):
                    cuda.synchronize()  # the GPU can go on, or says here that it can't
                # Else PyTorch up to 2.12 may believe it still captures, and refuse random numbers to later training.
                generator = cuda.default_generators[cuda.current_device()]
                generator.graphsafe_set_state(generator.clone_state())

    def _single(self) -> AbstractContextManager[None]:
        """What a plain launch needs around it; a graph was captured within it."""
        return nullcontext() if self._graph is not None else single_means_single()

    def _launch(self) -> None:
        if self._graph is not None:
            self._graph.replay()
        else:
            self._model(*self._bound)

    def call(self) -> None:
        with self._single():
            self._launch()
        self._torch.cuda.synchronize()

    def block(self, seconds: float, calls: int) -> list[float]:
        """Device seconds of each launch of a block, between CUDA events; the launch's way to the idle GPU is inside.

        The first one finds cold caches and is not counted.
        """
        cuda = self._torch.cuda
        self.call()
        start, stop = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        taken: list[float] = []
        begun = time.perf_counter()
        with self._single():
            while len(taken) < calls or time.perf_counter() - begun < seconds:
                start.record()
                self._launch()
                stop.record()
                stop.synchronize()
                taken.append(start.elapsed_time(stop) / 1e3)
        return taken

    def close(self) -> None:
        self._graph = self._results = None
        super().close()
