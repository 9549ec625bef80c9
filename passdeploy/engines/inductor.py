"""AOTInductor: PyTorch's own compiler, ahead of time, to native code in one package.

Weights are frozen, which lets batch norms fold into convolutions and CPU kernels pack their weights (ResNet-20 at
28 px, one thread: 1.1 ms against 1.4 ms). The package is native code: its digest is checked before it is loaded.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from passdeploy.engines._common import check_fits, cpu_reason, facts, one_line, read_graph
from passdeploy.engines.base import Backend, CompileInput, Engine, Runner, register
from passdeploy.errors import BadInput

if TYPE_CHECKING:
    from passdeploy.targets import Target


AUTOTUNE = "PASSDEPLOY_MAX_AUTOTUNE"
"""Environment variable: ``1`` lets inductor try Triton convolutions and products on a GPU beside cuDNN's and cuBLAS's.

A build then takes minutes instead of seconds, and a run builds dozens of engines.
"""


def compiler() -> str | None:
    """The C++ compiler that inductor would use; None when there is none."""
    named = os.environ.get("CXX")
    return next((path for name in (named, "g++", "c++", "clang++") if name and (path := shutil.which(name))), None)


def name_toolkit() -> None:
    """Sets ``CUDA_HOME`` for this process where PyTorch finds the toolkit without it, and it is not set.

    The compiled code is linked with ``-lcuda``. The driver installs no ``libcuda.so`` of that name, only the toolkit
    does, as a stub; and inductor looks for stubs only below ``CUDA_HOME`` as the environment has it.
    """
    from torch.utils.cpp_extension import CUDA_HOME

    if CUDA_HOME is not None:
        os.environ.setdefault("CUDA_HOME", CUDA_HOME)


def said(error: Exception) -> str:
    """What the C++ compiler said, if it was that: inductor puts the whole command line, thousands of letters, first."""
    return str(error).rpartition("Output:\n")[2].strip() or str(error)


@register
class Inductor(Backend):
    """AOTInductor on a CPU, or on the attached NVIDIA GPU with CUDA graphs."""

    name: ClassVar[str] = "inductor"
    suffix: ClassVar[str] = ".pt2"
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "fp16", "bf16")
    wants_program: ClassVar[bool] = True

    def available(self, target: Target) -> str | None:
        if compiler() is None:
            return "no C++ compiler; apt-get install g++ (or set CXX)"
        return self.runnable(target)

    def runnable(self, target: Target) -> str | None:  # a package is compiled already
        if target.compute_capability is None:
            return cpu_reason(target, ("fp32",))
        if target.precision not in self.precisions:
            return f"{target.precision} is not offered; known: {', '.join(self.precisions)}"
        if not target.attached:
            return f"AOTInductor compiles on the GPU that will run the package and no {target.device} is attached"
        return None

    def masks_by_kernel(self, target: Target) -> bool:
        return True

    def builds_vary(self, target: Target) -> bool:
        return target.compute_capability is not None  # Triton's kernels are tuned by timing them

    def version(self) -> str:
        import torch

        return torch.__version__

    def libraries(self) -> str:
        return self.version() + (", max_autotune" if os.environ.get(AUTOTUNE) == "1" else "")  # other kernels, then

    def rebuild(self, source: CompileInput, target: Target) -> Engine:
        return self.compile(source, target, fresh=True)

    def compile(self, source: CompileInput, target: Target, *, fresh: bool = False) -> Engine:
        import torch
        from torch._inductor import aoti_compile_and_package

        from passdeploy.engines._aoti import cpu_flags, drop_copies, prepare
        from passdeploy.tf32 import single_means_single

        graph = read_graph(source, target)
        on_gpu = target.compute_capability is not None
        settings: dict[str, Any] = {"freezing": True}
        if on_gpu:
            name_toolkit()
            settings |= {"max_autotune": os.environ.get(AUTOTUNE) == "1", "layout_optimization": True}
        else:
            settings |= {"cpp.threads": target.threads}
        before, begun = torch.get_num_threads(), time.perf_counter()
        uncached = {"force_disable_caches": True} if fresh else {}  # what autotuning found before, too
        with tempfile.TemporaryDirectory(prefix="passdeploy-aoti-") as folder:
            path = Path(folder, "model.pt2")

            def build() -> None:
                program = prepare(source, target.precision, "cuda" if on_gpu else "cpu")
                with torch.no_grad(), single_means_single():
                    aoti_compile_and_package(program, package_path=str(path), inductor_configs=settings | uncached)

            try:
                torch.set_num_threads(before if on_gpu else target.threads)
                try:
                    build()
                except Exception as error:
                    if not on_gpu or isinstance(error, BadInput):
                        raise
                    settings["freezing"] = False  # with frozen weights the compiler has less practice on GPUs
                    build()
            except BadInput:
                raise
            except Exception as error:
                raise BadInput(f"inductor: the model does not compile: {one_line(said(error))}") from None
            finally:
                torch.set_num_threads(before)
            data = path.read_bytes()
            drop_copies(path)
        meta = facts(target, self.version(), graph) | {
            "threads": target.threads,
            "compute_capability": target.compute_capability,
            "cpu_flags": cpu_flags(),
            "settings": settings,
            "build_s": round(time.perf_counter() - begun, 3),
        }
        return Engine(self.name, data, self.suffix, meta)

    def runner(self, engine: Engine, target: Target) -> Runner:
        from passdeploy.engines._aoti import AotiRunner, CudaAotiRunner, check_machine

        check_fits(engine, target, self.name, settings=("threads", "compute_capability"))
        check_machine(engine, self.name)
        import passdeploy.kernels.masked_op  # noqa: F401  (registers the operator that a masked network's package calls)

        kind = AotiRunner if target.compute_capability is None else CudaAotiRunner
        return kind(engine.data, engine.meta, target.threads)
