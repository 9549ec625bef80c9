"""Torch-TensorRT: TensorRT engines and what TensorRT can't do, together in one AOTInductor package.

Written to Torch-TensorRT's documentation (https://docs.pytorch.org/TensorRT, "AOTInductor Deployment") and not run so
far: it imports only beside a CUDA build of PyTorch and TensorRT's libraries.
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from passdeploy.engines._common import beneath, check_fits, facts, missing, one_line, read_graph
from passdeploy.engines.base import Backend, CompileInput, Engine, Runner, register
from passdeploy.engines.inductor import name_toolkit, said
from passdeploy.engines.tensorrt import timing_cache
from passdeploy.errors import BadInput, PassdeployError, Unavailable
from passdeploy.workspace import copy_file

if TYPE_CHECKING:
    from passdeploy.targets import Target


def _libraries() -> dict[str, str]:
    """Versions of the two that the engines in a package hold for; imports them."""
    import torch_tensorrt  # first: it may put TensorRT-RTX in TensorRT's place

    import tensorrt  # isort: skip

    return {"torch_tensorrt": torch_tensorrt.__version__, "tensorrt": tensorrt.__version__}


def _nameless() -> str | None:
    """Why it can't be imported by this user: it asks for the name, which a container's user need not have."""
    if os.name != "posix":
        return None
    import pwd

    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        return (
            f"Torch-TensorRT asks for the name of the user, and user {os.getuid()} has none here; "
            "start the container with -v /etc/passwd:/etc/passwd:ro"
        )
    return None


@cache
def _not_imported() -> str | None:
    """Why it can't be imported although it is installed; None when it can. Takes seconds."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it misses
            _libraries()
    except Exception as error:  # TensorRT's libraries, or a CUDA build of PyTorch: whatever it misses
        return f"it is installed and can't be imported: {one_line(error)}"
    return None


def _check_import() -> None:
    if reason := _not_imported():
        raise Unavailable(f"torch_tensorrt: {reason}")


@register
class TorchTensorRt(Backend):
    """Torch-TensorRT's dynamo path, ahead of time."""

    name: ClassVar[str] = "torch_tensorrt"
    suffix: ClassVar[str] = ".pt2"
    precisions: ClassVar[tuple[str, ...]] = ("fp16", "fp32", "bf16")
    wants_program: ClassVar[bool] = True

    def available(self, target: Target) -> str | None:
        if target.compute_capability is None:
            return "Torch-TensorRT compiles for NVIDIA GPUs, not for a CPU"
        if reason := missing("torch_tensorrt", "torch-tensorrt --extra-index-url https://pypi.nvidia.com"):
            return reason
        if target.precision not in self.precisions:
            return f"{target.precision} is not offered; known: {', '.join(self.precisions)}"
        if not target.attached:
            return f"Torch-TensorRT builds on the GPU that will run the engine and no {target.device} is attached"
        return _nameless()

    def runnable(self, target: Target) -> str | None:
        return self.available(target) or _not_imported()

    def builds_vary(self, target: Target) -> bool:
        return True

    def version(self) -> str:
        import torch

        return torch.__version__

    def libraries(self) -> str:
        return beneath(self.version(), ("torch-tensorrt", "tensorrt"))

    def rebuild(self, source: CompileInput, target: Target) -> Engine:
        """Without the timing cache, which would choose the same kernels again."""
        return self.compile(source, target, fresh=True)

    def compile(self, source: CompileInput, target: Target, *, fresh: bool = False) -> Engine:
        import torch

        _check_import()
        import torch_tensorrt

        from passdeploy.engines._aoti import cpu_flags, drop_copies, prepare
        from passdeploy.tf32 import single_means_single

        name_toolkit()
        graph = read_graph(source, target)
        program = prepare(source, target.precision, "cuda")
        shapes = [[target.batch if axis < 0 else axis for axis in shape] for shape in graph.inputs.values()]
        examples, begun = [torch.rand(shape, device="cuda") for shape in shapes], time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="passdeploy-torch-tensorrt-") as folder:
            path, timings = Path(folder, "model.pt2"), Path(folder, "timings")
            version = f"torch-{torch_tensorrt.__version__}"
            shared = None if fresh else timing_cache(version, target.device)
            # A copy: it is written in place, and what an interruption left of it would end every later build.
            if shared is not None and shared.exists():
                copy_file(shared, timings)
            try:
                # What TensorRT can't do goes to inductor, which takes TF32 from this process.
                with torch.no_grad(), single_means_single():
                    # The program's own types decide the precision, as in the other TensorRT backends.
                    compiled = torch_tensorrt.dynamo.compile(
                        program,
                        arg_inputs=examples,
                        use_explicit_typing=True,
                        disable_tf32=True,
                        min_block_size=1,
                        timing_cache_path=str(timings),
                    )
                    torch_tensorrt.save(
                        compiled, str(path), output_format="aot_inductor", arg_inputs=examples, retrace=True
                    )
            except Exception as error:
                raise BadInput(f"torch_tensorrt: the model does not compile: {one_line(said(error))}") from None
            if shared is not None and timings.exists():
                with contextlib.suppress(PassdeployError):  # where it can't be written, kernels are timed anew
                    copy_file(timings, shared)
            data = path.read_bytes()
            drop_copies(path)
        meta = facts(target, self.version(), graph) | {
            **_libraries(),
            "compute_capability": target.compute_capability,
            "cpu_flags": cpu_flags(),
            "build_s": round(time.perf_counter() - begun, 3),
        }
        return Engine(self.name, data, self.suffix, meta)

    def runner(self, engine: Engine, target: Target) -> Runner:
        from passdeploy.engines._aoti import CudaAotiRunner, check_machine

        check_fits(engine, target, self.name, settings=("compute_capability",))
        check_machine(engine, self.name)
        _check_import()
        for package, here in _libraries().items():  # imports what runs the engines in the package
            made = engine.meta.get(package)
            if made is None:
                raise BadInput(f"{self.name}: the package does not tell which {package} made it; compile it again here")
            if made.split("+")[0] != here.split("+")[0]:
                raise BadInput(
                    f"{self.name}: the package was made by {package} {made}, this is {here}; compile it again here, "
                    f"or install {package} {made}"
                )
        return CudaAotiRunner(engine.data, engine.meta, target.threads)
