"""The machine and the software of a run, for its report: quick, and without host or user names."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from passdeploy import huge_pages
from passdeploy.targets import attached_gpus, cpu_name

PACKAGES = (
    "passdeploy", "torch", "torchvision", "torch-pruning", "numpy", "onnx", "onnxscript", "onnxruntime",
    "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-rtx-cu13", "torch-tensorrt", "polygraphy", "cuda-bindings",
    "pycuda", "triton",
)  # fmt: skip
VARIABLES = (
    "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES",
    huge_pages.VARIABLE,
)  # fmt: skip
HUGE_PAGES = "huge pages"
"""The setting that says whether weights lay in them."""


def environment() -> dict[str, Any]:
    """What the report's `environment` holds.

    Returns:
        ``cpu``, ``gpu`` and ``driver`` (None without one), ``versions`` of the packages that are installed, and
        ``settings``: threads, governor, load, memory, huge pages, system, and the variables that change a latency.
    """
    gpus = nvidia_smi()
    return {
        "cpu": cpu_name(),
        "gpu": gpus[0]["name"] if gpus else None,
        "driver": gpus[0]["driver"] if gpus else None,
        "versions": versions(),
        "settings": _settings() | (_gpu_settings(gpus) if gpus else {}),
    }


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Installed versions, without importing anything."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def usable_cores() -> int:
    """Logical cores that this process may use: affinity and a container's quota counted, at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cpu_quota()
    return cores if quota is None else max(1, min(cores, int(quota)))


def _cpu_quota() -> float | None:
    """Cores that the control group (version 2) grants; None without a limit."""
    try:
        limit, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if limit == "max" else int(limit) / int(period)
    except (OSError, ValueError):
        return None


def memory_bytes() -> int:
    """Memory that this process may use: the machine's, or the container's when that is less."""
    total = int(psutil.virtual_memory().total)
    try:
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):
        return total


def governor() -> str | None:
    """How the CPU's clock is governed; None where the system does not say (most virtual machines)."""
    try:
        return Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").read_text().strip()
    except OSError:
        return None


def is_virtual() -> bool:
    """Whether the CPU says that it runs under a hypervisor."""
    try:
        return " hypervisor" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def nvidia_smi() -> list[dict[str, str]]:
    """What the driver says of each GPU: name, driver, memory, compute_capability, clock, temperature; empty without.

    First the one that everything runs on: the driver lists all, in an order of its own, whatever CUDA_VISIBLE_DEVICES
    says.
    """
    program = shutil.which("nvidia-smi")
    gpus = [] if program is None else _query(program)
    used = _used_gpu() if len(gpus) > 1 else None
    return sorted(gpus, key=lambda gpu: gpu["uuid"] != used)


def _used_gpu() -> str | None:
    """The first GPU that this process sees, as the driver identifies it; None where PyTorch can't tell."""
    if not attached_gpus():
        return None
    import torch

    return f"GPU-{torch.cuda.get_device_properties(0).uuid}"


def _query(program: str) -> list[dict[str, str]]:
    keys = {
        "name": "name",
        "driver": "driver_version",
        "memory": "memory.total",
        "compute_capability": "compute_cap",
        "clock": "clocks.sm",
        "temperature": "temperature.gpu",
        "uuid": "uuid",
    }
    try:
        done = subprocess.run(
            [program, f"--query-gpu={','.join(keys.values())}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    if done.returncode != 0:
        return []
    rows = [[value.strip() for value in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    return [dict(zip(keys, row, strict=True)) for row in rows if len(row) == len(keys)]


@cache
def system() -> str:
    """Name of the system and its kernel."""
    try:
        name = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        name = platform.system()
    return f"{name}, {platform.system()} {platform.release()} {platform.machine()}"


def load_average() -> float | None:
    """Runnable threads in the last minute; None where the system does not say."""
    try:
        return os.getloadavg()[0]
    except OSError:
        return None


def _settings() -> dict[str, str]:
    load = load_average()
    values = {
        "system": system(),
        "threads": f"{usable_cores()} usable of {os.cpu_count()}",
        "governor": governor() or "not said",
        "virtual machine": "yes" if is_virtual() else "no",
        "load": "not said" if load is None else f"{load:.2f}",
        "memory": f"{memory_bytes() / 2**30:.1f} GiB",
        HUGE_PAGES: "yes" if huge_pages.used() else "no",
    }
    return values | {name: os.environ[name] for name in VARIABLES if name in os.environ}


def _gpu_settings(gpus: list[dict[str, str]]) -> dict[str, str]:
    first = gpus[0]
    return {
        "GPU memory": first["memory"],
        "GPU clock": first["clock"],
        "GPU temperature": f"{first['temperature']} °C",
        "GPU count": str(len(gpus)),
    }
