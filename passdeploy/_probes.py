"""Looks at one thing of the machine at a time, in a child process where it may crash, hang or take long."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        area: Under which it is shown.
        name: What was looked at.
        ok: Whether it is there and works.
        detail: What was found.
        fix: How to get it; None when it is there or can't be had.
        needed: Whether nothing works without it.
    """

    area: str
    name: str
    ok: bool
    detail: str
    fix: str | None = None
    needed: bool = False


@dataclass(frozen=True)
class Package:
    """An importable module `m`, and an expression that proves that it works and says what it is."""

    area: str
    name: str
    module: str
    fix: str
    proof: str = "getattr(m, '__version__', 'found')"
    needed: bool = False


_BUILDS = "m.__version__ + (', builds engines' if m.Builder(m.Logger(m.Logger.ERROR)) else ', builds nothing here')"
PACKAGES = (
    Package(
        area="engines",
        name="ONNX Runtime",
        module="onnxruntime",
        fix="pip install onnxruntime",
        proof="m.__version__ + ' for ' + ', '.join(m.get_available_providers()).replace('ExecutionProvider', '')",
        needed=True,
    ),
    Package(
        area="engines",
        name="OpenVINO",
        module="openvino",
        fix="pip install 'passdeploy[openvino]'",
        proof="m.__version__.split('-')[0] + ' for ' + ', '.join(m.Core().available_devices)",
    ),
    Package("engines", "TensorRT-RTX", "tensorrt_rtx", "pip install 'passdeploy[rtx]'", _BUILDS),
    Package("engines", "Polygraphy", "polygraphy", "pip install 'passdeploy[rtx]'"),
    Package("engines", "TensorRT", "tensorrt", "pip install 'passdeploy[tensorrt]' where an NVIDIA GPU is", _BUILDS),
    Package(
        "engines", "Torch-TensorRT", "torch_tensorrt", "pip install 'passdeploy[torch-tensorrt]' with a CUDA torch"
    ),
    Package(
        area="GPU",
        name="NVRTC, cuda-bindings",
        module="cuda.bindings.nvrtc",
        fix="pip install 'passdeploy[cuda]'",
        proof="'NVRTC %d.%d' % m.nvrtcVersion()[1:]",
    ),
    Package(
        area="GPU",
        name="PyCUDA",
        module="pycuda.driver",
        fix="pip install pycuda where the CUDA toolkit is; cuda-bindings serve as well",
        proof="'.'.join(map(str, m.get_version()))",
    ),
    Package("shipping", "tritonclient", "tritonclient.grpc", "pip install 'passdeploy[serve]'", "'found'"),
    Package("shipping", "model-signing", "model_signing", "pip install 'passdeploy[sign]'"),
)


def check_packages(packages: Sequence[Package] = PACKAGES) -> list[Finding]:
    """Two at a time."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(check_package, packages))


def check_package(package: Package) -> Finding:
    """Imports a package in a child process and lets it prove that it works."""
    try:
        there = importlib.util.find_spec(package.module.split(".")[0]) is not None
    except (ImportError, ValueError):
        there = False
    if not there:
        return Finding(package.area, package.name, False, "not installed", package.fix, package.needed)
    code = f"import importlib; m = importlib.import_module({package.module!r}); print({package.proof})"
    ok, said = run([sys.executable, "-P", "-c", code], timeout=60)
    return Finding(package.area, package.name, ok, said, None if ok else package.fix, package.needed)


def run(command: list[str], timeout: float = 20, pick: Callable[[str], bool] = bool) -> tuple[bool, str]:
    """Runs a program.

    Returns:
        Whether it went well, and one line of what it said: the first that `pick` likes, or the last of its errors.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return False, f"no answer within {timeout:g} s"
    except OSError as error:
        return False, short(error)
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        return False, f"broken: {lines[-1][:160]}" if lines else f"broken: ends with status {done.returncode}"
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip() and pick(line)]
    return True, lines[0] if lines else "found"


def short(error: BaseException) -> str:
    """An error on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}" if text else type(error).__name__
