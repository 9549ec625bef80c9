"""Compiles kernels/*.cu: ahead of time with nvcc, at run time with NVRTC. Neither needs a GPU.

``python -m passdeploy.kernels.build FOLDER`` writes one fatbin per source (machine code for every architecture, and PTX
for the ones to come); a wheel built where there is an nvcc carries them.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from passdeploy.errors import PassdeployError, Unavailable
from passdeploy.user_cache import user_cache

SOURCES = ("masked_affine_act", "prompted_input")
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
"""Compute capabilities (times ten) of which a wheel carries machine code."""
PTX = 90
"""The driver compiles this for devices that are newer than all of them, or between them."""


def source_folder() -> Path:
    """Where the .cu files lie: inside an installed package, else at the top of the repository."""
    packaged = Path(__file__).parent / "cuda"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "kernels"


def _headers() -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(source_folder().glob("*.cuh"))}


def source_of(kernel: str) -> str:
    """Name of the source file of an ``extern "C"`` function."""
    return next(source for source in SOURCES if kernel.startswith(source))


def digest(source: str, *extra: str) -> str:
    """Changes with the source, its headers and whatever else the result depends on."""
    h = hashlib.sha256((source_folder() / f"{source}.cu").read_bytes())
    for text in (*_headers().values(), *extra):
        h.update(b"\0" + text.encode())
    return h.hexdigest()[:24]


def nvcc_path() -> str | None:
    """The compiler on PATH, or of the toolkit that CUDA_HOME names; None without one."""
    candidates = [shutil.which("nvcc")]
    candidates += [f"{home}/bin/nvcc" for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    return next((c for c in candidates if c and Path(c).is_file()), None)


def compile_nvcc(source: str, out: Path, *flags: str) -> None:
    """Runs nvcc on one source.

    Raises:
        Unavailable: There is no nvcc.
        PassdeployError: It refused the source.
    """
    nvcc = nvcc_path()
    if nvcc is None:
        raise Unavailable("nvcc was not found on PATH, in $CUDA_HOME or in /usr/local/cuda; install the CUDA toolkit")
    folder = source_folder()
    command = [nvcc, "-std=c++17", "-I", str(folder), *flags, "-o", str(out), str(folder / f"{source}.cu")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = " ".join((done.stderr or done.stdout).split())
        raise PassdeployError(f"nvcc can't compile {source}.cu: {said[:500]}")


def build_fatbin(source: str, out: Path, threads: int = 2) -> None:
    """One file with machine code for all of `ARCHITECTURES` and `PTX`; the driver picks."""
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    flags.append(f"-gencode=arch=compute_{PTX},code=compute_{PTX}")
    compile_nvcc(source, out, "-fatbin", "--threads", str(threads), "--compress-mode=size", *flags)


def prebuilt(source: str) -> bytes | None:
    """The fatbin that came with the package; None when it was built where there was no nvcc."""
    path = source_folder() / f"{source}.fatbin"
    return path.read_bytes() if path.is_file() else None


def _checked(result: tuple[Any, ...], what: str) -> Any:
    status, *values = result
    if int(status) != 0:
        raise PassdeployError(f"NVRTC can't {what}: {status}")
    return values[0] if values else None


def _written(size: Callable[..., Any], get: Callable[..., Any], program: Any, what: str) -> bytes:
    """What NVRTC writes into a buffer of the size that it names: never into bytes, which others may share."""
    buffer = bytearray(_checked(size(program), what))
    _checked(get(program, buffer), what)
    return bytes(buffer)


def compile_nvrtc(source: str, capability: int, *, ptx: bool = False) -> bytes:
    """Compiles one source in memory for a compute capability (times ten, such as 90).

    Args:
        source: Name of the source file.
        capability: Of the device.
        ptx: PTX is wanted, whatever the device.

    Returns:
        A cubin, or PTX for the newest architecture NVRTC knows when the device is newer than that.

    Raises:
        Unavailable: NVRTC is not installed.
        PassdeployError: It refused the source.
    """
    try:
        from cuda.bindings import nvrtc

        known = [int(a) for a in _checked(nvrtc.nvrtcGetSupportedArchs(), "list its architectures")]
    except (ImportError, RuntimeError) as error:  # cuda-bindings is missing, or the library it loads is
        raise Unavailable(
            f"NVRTC can't be loaded ({type(error).__name__}): pip install 'passdeploy[cuda]' "
            "(cuda-bindings and nvidia-cuda-nvrtc)"
        ) from error
    exact = capability in known and not ptx
    usable = [a for a in known if a <= capability]
    if not usable:
        raise Unavailable(f"NVRTC knows no architecture up to {capability / 10}; oldest {min(known) / 10}")
    headers = _headers()
    program = _checked(
        nvrtc.nvrtcCreateProgram(
            (source_folder() / f"{source}.cu").read_bytes(),
            f"{source}.cu".encode(),
            len(headers),
            [text.encode() for text in headers.values()],
            [name.encode() for name in headers],
        ),
        f"take {source}.cu",
    )
    architecture = f"sm_{capability}" if exact else f"compute_{max(usable)}"
    options = [b"-std=c++17", f"--gpu-architecture={architecture}".encode()]
    size, get = (nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN) if exact else (nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX)
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if int(status) != 0:
            log = _written(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program, "give its log")
            said = " ".join(log.rstrip(b"\0 ").decode(errors="replace").split())
            raise PassdeployError(f"NVRTC can't compile {source}.cu for {architecture}: {said[:500]}")
        return _written(size, get, program, "give its result")
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _nvrtc_version() -> str:
    try:
        from cuda.bindings import nvrtc

        return repr(nvrtc.nvrtcVersion()[1:])
    except (ImportError, RuntimeError):
        return ""  # `compile_nvrtc` will say what is missing, unless the code was kept


def compiled(source: str, capability: int) -> bytes:
    """Machine code made by NVRTC, kept in the user's cache folder under a digest of everything it depends on."""
    name = f"{source}-sm{capability}-{digest(source, _nvrtc_version())}.cubin"
    cache = user_cache() / "kernels"
    path = cache / name
    try:
        return path.read_bytes()
    except OSError:
        pass
    code = compile_nvrtc(source, capability)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=cache, delete=False) as file:
            temporary = Path(file.name)
            try:
                file.write(code)
                file.flush()
                temporary.replace(path)
            finally:  # on a full disk every process would leave a piece
                temporary.unlink(missing_ok=True)
    except OSError:
        pass  # a read-only home costs a compilation per process, nothing else
    return code


def main() -> None:
    """Writes the fatbins into the folder named on the command line."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for source in SOURCES:
        build_fatbin(source, folder / f"{source}.fatbin")
        print(folder / f"{source}.fatbin")


if __name__ == "__main__":
    main()
