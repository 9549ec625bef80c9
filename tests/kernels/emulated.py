"""Runs kernels/*.cu on the CPU: built with g++ behind a shim, once per content, and launched as a GPU would."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from passdeploy.kernels import build
from passdeploy.kernels.geometry import Launch

HERE = Path(__file__).parent / "emulation"
PARAMS = {"masked_affine_act": "MaskedAffineActParams", "prompted_input": "PromptedInputParams"}
GUARD = 64
"""Bytes before and after every array that a kernel must leave alone."""


class Finding(AssertionError):
    """What the emulator has against a launch."""


def have_compiler() -> bool:
    return shutil.which("g++") is not None


def build_library(source: Path, params: str) -> Path:
    """Compiles one .cu with the emulator into a shared library, or finds the one built before."""
    h = hashlib.sha256(params.encode())
    folder = build.source_folder()
    for path in [source, *sorted(folder.glob("*.cuh")), *sorted(HERE.glob("*.h")), *sorted(HERE.glob("emulator.cpp"))]:
        h.update(path.read_bytes())
    out = Path(tempfile.gettempdir()) / f"passdeploy-emulation-{os.getuid()}" / f"{source.stem}-{h.hexdigest()[:20]}.so"
    if out.is_file():
        return out
    out.parent.mkdir(mode=0o700, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        built = Path(scratch) / out.name
        command = [
            "g++", "-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Werror", "-Wno-unknown-pragmas",
            "-Wno-unused-function", "-U_FORTIFY_SOURCE", "-fsanitize=undefined", "-static-libubsan",
            "-ffp-contract=off", "-fno-strict-aliasing", "-I", str(folder), "-I", str(HERE),
            f'-DKERNEL_FILE="{source}"', f"-DPARAMS={params}", str(HERE / "emulator.cpp"), "-o", str(built),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        built.replace(out)
    return out


@cache
def library(source: Path, params: str) -> ctypes.CDLL:
    lib = ctypes.CDLL(str(build_library(source, params)))
    lib.region_reads.restype = lib.region_writes.restype = ctypes.POINTER(ctypes.c_ubyte)
    lib.add_region.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    lib.last_error.restype = ctypes.c_char_p
    return lib


def guarded(tensor: Tensor, offset: int = 0, fill: int | None = None) -> Tensor:
    """A copy between guard bytes, `offset` bytes after a 16-byte boundary, in the layout of `tensor`.

    Args:
        fill: A byte to fill it with instead of copying.
    """
    size = tensor.numel() * tensor.element_size()
    raw = torch.full((size + 2 * GUARD + 32,), 0xA5, dtype=torch.uint8, device=tensor.device)
    start = GUARD + (-(raw.data_ptr() + GUARD)) % 16 + offset
    inner = raw[start : start + size]
    copy = torch.as_strided(inner.view(tensor.dtype), tensor.size(), tensor.stride())
    if fill is None:
        copy.copy_(tensor)
    else:
        inner.fill_(fill)
    copy._guard = (raw, start, size)  # type: ignore[attr-defined]
    return copy


def check_guards(tensor: Tensor) -> None:
    raw, start, size = tensor._guard  # type: ignore[attr-defined]
    outside = torch.cat([raw[:start], raw[start + size :]])
    assert bool((outside == 0xA5).all()), "guard bytes were changed"


class Emulated:
    """A `passdeploy.kernels.enqueue.Loader` whose GPU is the CPU.

    Args:
        order: In which order the threads of a block take turns (0 rising, 1 falling, else a shuffle's seed).
    """

    def __init__(self, order: int = 0) -> None:
        self.order = order
        self.launches: list[Launch] = []
        self.awaited: list[int] = []
        self._tensors: dict[str, Tensor] = {}
        self._regions: dict[str, tuple[ctypes.CDLL, int, int]] = {}

    @contextmanager
    def arrays(self, **tensors: Tensor | None) -> Iterator[None]:
        """Only these may be touched meanwhile; afterwards their guards are checked."""
        self._tensors = {name: t for name, t in tensors.items() if t is not None}
        yield
        for tensor in self._tensors.values():
            if hasattr(tensor, "_guard"):
                check_guards(tensor)

    def launch(self, launch: Launch, stream: int) -> None:
        source = build.source_of(launch.kernel)
        lib = library(build.source_folder() / f"{source}.cu", PARAMS[source])
        self.launches.append(launch)
        self._register(lib)
        failed = lib.emulate(
            ctypes.cast(getattr(lib, launch.kernel), ctypes.c_void_p),
            ctypes.byref(launch.params),
            *launch.grid,
            launch.threads,
            launch.shared_bytes,
            self.order,
        )
        if failed:
            raise Finding(f"{launch.kernel}: {lib.last_error().decode()}")

    def wait(self, stream: int, other: int) -> None:
        self.awaited.append(other)

    def _register(self, lib: ctypes.CDLL) -> None:
        lib.clear_regions()
        for name, tensor in self._tensors.items():
            size = tensor.numel() * tensor.element_size()
            self._regions[name] = (lib, lib.add_region(tensor.data_ptr(), size), size)

    def flat(self, kernel: str, pointers: list[int], numbers: list[int], out: int, blocks: int, threads: int) -> None:
        """Launches ``masked_affine_act_flat(_residual)_*``, whose arguments are pointers and numbers."""
        lib = library(build.source_folder() / "masked_affine_act.cu", PARAMS["masked_affine_act"])
        self._register(lib)
        inputs = [ctypes.c_void_p(p or None) for p in (*pointers, *[0] * (5 - len(pointers)))]
        kernel_address = ctypes.cast(getattr(lib, kernel), ctypes.c_void_p)
        if lib.emulate_flat(kernel_address, *inputs, *numbers, ctypes.c_void_p(out), blocks, threads):
            raise Finding(f"{kernel}: {lib.last_error().decode()}")

    def reads(self, name: str) -> np.ndarray:
        """How often each byte of an array was read by the last launch."""
        lib, region, size = self._regions[name]
        return np.ctypeslib.as_array(lib.region_reads(region), (size,)).copy()

    def writes(self, name: str) -> np.ndarray:
        """How often each byte of an array was written by the last launch."""
        lib, region, size = self._regions[name]
        return np.ctypeslib.as_array(lib.region_writes(region), (size,)).copy()


class Anywhere(Emulated):
    """Allows every address: the operator makes arrays of its own."""

    def _register(self, lib: ctypes.CDLL) -> None:
        lib.clear_regions()
        lib.allow_all_addresses()
