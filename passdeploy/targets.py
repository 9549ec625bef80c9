"""Named targets: hardware and the run-time settings under which a latency is meant."""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import os
import platform
import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from passdeploy import huge_pages
from passdeploy.errors import BadInput, Unavailable, nearest


@dataclass(frozen=True)
class Device:
    """A kind of hardware that can be named as a target.

    Attributes:
        name: As typed after ``--target``.
        title: In words.
        compute_capability: NVIDIA compute capability such as "8.0"; None for a CPU.
        backends: In order of preference.
        precision: The default.
        matches: Lower-case fragments of the names under which the driver lists it.
    """

    name: str
    title: str
    compute_capability: str | None
    backends: tuple[str, ...]
    precision: str
    matches: tuple[str, ...] = ()


_GPU = ("tensorrt", "tensorrt_rtx", "torch_tensorrt", "inductor")
DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        Device("cpu", "this machine's CPU", None, ("onnxruntime", "openvino", "inductor"), "fp32"),
        Device("a100", "NVIDIA A100", "8.0", _GPU, "fp16", ("a100",)),
        Device("a10", "NVIDIA A10", "8.6", _GPU, "fp16", ("a10",)),
        Device("t4", "NVIDIA T4", "7.5", _GPU, "fp16", ("t4",)),
        Device("l4", "NVIDIA L4", "8.9", _GPU, "fp16", ("l4",)),
        Device("l40s", "NVIDIA L40S", "8.9", _GPU, "fp16", ("l40s",)),
        Device("rtx4090", "NVIDIA GeForce RTX 4090", "8.9", _GPU, "fp16", ("4090",)),
        Device("h100", "NVIDIA H100", "9.0", _GPU, "fp16", ("h100",)),
        Device("h200", "NVIDIA H200", "9.0", _GPU, "fp16", ("h200",)),
    )
}
OTHER_CHIPS = frozenset({"laptop", "d"})
"""Words of names such as ``RTX 4090 Laptop GPU`` and ``RTX 4090 D``, which are not the chip that the rest names."""
ANY_GPU = "gpu"
"""The target that is whatever GPU comes first here."""


@dataclass(frozen=True)
class Target:
    """Named hardware with run-time settings.

    Attributes:
        name: Key of `DEVICES`, or `ANY_GPU`.
        device: The attached device as it names itself, else the catalogue's title.
        compute_capability: "8.0"; None for a CPU.
        backend: Compiler and run time.
        precision: fp32, fp16, bf16, int8 or fp8.
        batch: Images per inference.
        threads: CPU threads of one inference.
        attached: Whether this machine has it.
    """

    name: str
    device: str
    compute_capability: str | None
    backend: str
    precision: str
    batch: int
    threads: int
    attached: bool

    def with_(self, **changes: object) -> Target:
        """A copy with some settings changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


_CPU_FACTS = ("cpu family", "model", "stepping", "cache size", "flags", "CPU ", "Features")
"""Lines of /proc/cpuinfo, on x86 and (the last two) on ARM."""


@cache
def cpu_stamp() -> str:
    """Tells CPUs of one name apart, as those of virtual machines are: a digest of family, model, caches and flags.

    One and the same CPU has two: whether weights lie in huge pages is felt as another CPU would be.
    """
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return ""
    told = [s for s in first.splitlines() if s.startswith(_CPU_FACTS)]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:12] + "-huge" * huge_pages.used()


@cache
def cpu_name() -> str:
    """The CPU's model name with its widest vector extension."""
    name, extension = platform.processor() or platform.machine(), ""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return name
    for line in text.splitlines():
        if line.startswith("model name"):
            name = line.split(":", 1)[1].strip()
            break
    else:  # ARM's have a maker and a part instead
        told = dict(part.split(":", 1) for part in text.split("\n\n")[0].splitlines() if ":" in part)
        facts = {key.strip(): value.strip() for key, value in told.items()}
        name = " ".join([name, *(facts[key] for key in ("CPU implementer", "CPU part") if key in facts)])
    for flag, label in (("amx_tile", "AMX"), ("avx512f", "AVX-512"), ("avx2", "AVX2")):
        if f" {flag}" in text:
            extension = f" ({label})"
            break
    return name + extension


@cache
def attached_gpus() -> tuple[str, ...]:
    """Names of the NVIDIA GPUs that this process sees, in CUDA's order; empty without a driver."""
    try:  # importing torch.cuda would find out, too, but slowly; by name, since ldconfig need not know the driver
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return ()
    import torch

    if not torch.cuda.is_available():
        return ()
    return tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def attached_device(device: Device) -> str | None:
    """The attached hardware that `device` names, as it names itself; None when this machine has none.

    Of several GPUs only the first counts: everything runs there.
    """
    if device.compute_capability is None:
        return cpu_name()
    gpus = attached_gpus()
    return gpus[0] if gpus and _names(device, gpus[0]) else None


def _names(device: Device, gpu: str) -> bool:
    return device.name == ANY_GPU or (_is_kind(device, gpu) and not _is_slice(gpu))


def _is_kind(device: Device, gpu: str) -> bool:
    """Whether a GPU's name has the device's in it; a laptop's, and a "D", are other chips of that name."""
    return not _words(gpu).isdisjoint(device.matches) and _words(gpu).isdisjoint(OTHER_CHIPS)


def _is_slice(gpu: str) -> bool:
    """Whether it is a part of a GPU (MIG, or vGPU: ``A10-4Q``), whose latencies are not those of the whole."""
    return "mig" in _words(gpu) or re.search(r"-\d+[qcab]$", gpu.lower()) is not None


def _words(gpu: str) -> set[str]:
    return set(re.split(r"[^a-z0-9]+", gpu.lower()))


def not_first(device: Device) -> str | None:
    """Why the GPU that `device` names is not used although it is here, and how it would be; None unless that is so."""
    if device.compute_capability is None or attached_device(device):
        return None
    number = next((n for n, gpu in enumerate(attached_gpus()) if _names(device, gpu)), None)
    if number is None:
        first = next(iter(attached_gpus()), "")
        if not (_is_kind(device, first) and _is_slice(first)):
            return None
        return f"what is here is a part of one, {first}, which has other latencies; it is --target {ANY_GPU}"
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return (
        f"the {attached_gpus()[number]} here is GPU {number}, and everything runs on the first one, "
        f"{attached_gpus()[0]}; start with CUDA_VISIBLE_DEVICES={visible[number] if visible else number}"
    )


def _first_gpu() -> Device:
    gpus = attached_gpus()
    if not gpus:
        raise Unavailable(
            f"target {ANY_GPU}: no NVIDIA GPU is attached to this machine; passdeploy targets lists those that are "
            "compiled for without one"
        )
    import torch

    return Device(ANY_GPU, gpus[0], "{}.{}".format(*torch.cuda.get_device_capability(0)), _GPU, "fp16")


def get_device(name: str) -> Device:
    """The device of that name; `ANY_GPU` is the first GPU of this machine.

    Raises:
        BadInput: No such target; has the nearest names.
        Unavailable: There is no GPU.
    """
    if name == ANY_GPU:
        return _first_gpu()
    if name not in DEVICES:
        raise BadInput(f"--target {name}: no such target{nearest(name, [*DEVICES, ANY_GPU])}")
    return DEVICES[name]


def resolve(
    name: str, *, backend: str | None = None, precision: str | None = None, batch: int = 1, threads: int = 1
) -> Target:
    """Fills in a target's defaults and finds out whether it is attached.

    Raises:
        BadInput: No such target or backend.
        Unavailable: No backend can compile for it here, or it is a GPU that is here, but not the first one.
    """
    from passdeploy.engines.base import first_available, get_backend, require

    device = get_device(name)
    if reason := not_first(device):
        raise Unavailable(f"target {name}: {reason}")
    attached = attached_device(device)
    target = Target(
        name=name,
        device=attached or device.title,
        compute_capability=device.compute_capability,
        backend=backend or device.backends[0],
        precision=precision or device.precision,
        batch=batch,
        threads=threads,
        attached=attached is not None,
    )
    if backend is None:
        return target.with_(backend=first_available(device.backends, target).name)
    chosen = get_backend(backend)
    require(chosen, target)
    if target.precision not in chosen.precisions:
        raise BadInput(
            f"--precision {target.precision}: backend {backend} offers {', '.join(chosen.precisions)} on {name}"
        )
    return target
