"""What this machine has, found out without torch: its CPU's features, its NVIDIA GPUs and their driver.

Standard library only: the runner depends on it.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

_MAJOR, _MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR (cuda.h)."""


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU as the driver names it."""

    name: str
    compute_capability: str


@dataclass(frozen=True)
class Machine:
    """What engines may ask for."""

    machine: str
    cpu_features: frozenset[str]
    gpus: tuple[Gpu, ...]
    driver: str | None
    """CUDA version that the driver supports, such as "13.0"; None without one."""


def _gpus() -> tuple[tuple[Gpu, ...], str | None]:
    try:
        # By name: ctypes.util.find_library starts ldconfig and a compiler, which takes longer than all else here.
        cuda = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return (), None
    if cuda.cuInit(0) != 0:
        return (), None
    version, count = ctypes.c_int(), ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(version))
    cuda.cuDeviceGetCount(ctypes.byref(count))
    gpus = []
    for index in range(count.value):
        device, name = ctypes.c_int(), ctypes.create_string_buffer(256)
        major, minor = ctypes.c_int(), ctypes.c_int()
        cuda.cuDeviceGet(ctypes.byref(device), index)
        cuda.cuDeviceGetName(name, 256, device)
        cuda.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
        cuda.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
        gpus.append(Gpu(name.value.decode(), f"{major.value}.{minor.value}"))
    return tuple(gpus), f"{version.value // 1000}.{version.value % 1000 // 10}"


def _cpu_features() -> frozenset[str]:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return frozenset(line.split(":", 1)[1].split())
    except OSError:
        pass
    return frozenset()


@cache
def this_machine() -> Machine:
    """The machine that this process runs on."""
    gpus, driver = _gpus()
    return Machine(platform.machine(), _cpu_features(), gpus, driver)


def _number(capability: str) -> tuple[int, ...]:
    return tuple(int(part) for part in capability.split("."))


def misfit(requires: Mapping[str, Any], machine: Machine) -> str | None:
    """Why an engine with these requirements (`bundle.json`) can't run here; None when it can."""
    wanted = requires.get("machine")
    if wanted and wanted != machine.machine:
        return f"it is for {wanted}, this machine is {machine.machine}"
    # Without /proc/cpuinfo the features are unknown: the sample outputs decide.
    missing = sorted(set(requires.get("cpu_features", ())) - machine.cpu_features) if machine.cpu_features else []
    if missing:
        return f"it needs a CPU with {', '.join(missing)}, which this one lacks"
    # Where they are known, not left to the samples: their tolerance is wider than what saturated sums do to them.
    one_of = requires.get("cpu_features_any", ())
    if one_of and machine.cpu_features and machine.cpu_features.isdisjoint(one_of):
        return f"its int8 weights need a CPU with one of {', '.join(one_of)}"
    capabilities = list(requires.get("compute_capabilities", ()))
    if not capabilities:
        return None
    built = ", ".join(capabilities)
    if not machine.gpus:
        return f"it is for an NVIDIA GPU of compute capability {built}, this machine has none"
    gpu = machine.gpus[0]
    newer = requires.get("or_newer") and _number(gpu.compute_capability) >= min(map(_number, capabilities))
    if gpu.compute_capability not in capabilities and not newer:
        return f"it is for compute capability {built}, this machine has {gpu.name} ({gpu.compute_capability})"
    return None
