"""What this machine can do, what is missing for the rest, and how to get it."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from passdeploy import environment, huge_pages
from passdeploy._probes import Finding, check_packages, run, short
from passdeploy.errors import PassdeployError
from passdeploy.targets import (
    ANY_GPU,
    DEVICES,
    Device,
    Target,
    attached_device,
    attached_gpus,
    cpu_name,
    get_device,
    not_first,
)

__all__ = ["Finding", "TargetRow", "diagnose", "list_targets", "render", "render_targets", "to_json"]

SCHEMA = "passdeploy.doctor/1"
AREAS = ("machine", "engines", "GPU", "data", "shipping", "targets")
ENOUGH_DISK = 5 * 2**30
ENOUGH_MEMORY = 3 * 2**30
NOISY = 0.15
"""Share of all cores that others use from which measured latencies are uncertain."""


def diagnose() -> list[Finding]:
    """Looks at the machine; takes some seconds, most of them imports in child processes.

    Never raises because something is broken: that is a finding.
    """
    findings = [_load()]  # before anything of ours is running
    findings += [_python(), _torch(), _cpu(), _governor(), _huge_pages(), _memory(), _disk(), _compiler()]
    findings += [_gpu(), _cuda_torch(), _nvcc(), *check_packages(), *_data(), *_targets(list_targets())]
    return sorted(findings, key=lambda finding: AREAS.index(finding.area))


def to_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """JSON-able, for ``passdeploy doctor --json``."""
    return {
        "schema": SCHEMA,
        "ok": all(finding.ok for finding in findings if finding.needed),
        "findings": [asdict(finding) for finding in findings],
        "environment": environment.environment(),
    }


def render(findings: Sequence[Finding]) -> RenderableType:
    """A table of the findings by area, with what to do about what is missing."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    table.add_column("what", no_wrap=True)
    table.add_column("found", overflow="fold", ratio=3)
    table.add_column("to get it", overflow="fold", ratio=2)
    area = ""
    for finding in findings:
        if finding.area != area:
            table.add_row("", f"[bold]{finding.area}[/bold]")
            area = finding.area
        mark = "[green]✓[/green]" if finding.ok else "[red]✗[/red]" if finding.needed else "[yellow]-[/yellow]"
        table.add_row(mark, finding.name, escape(finding.detail), escape(finding.fix or ""))
    return table


# --- the machine ---


def _python() -> Finding:
    ok = sys.version_info >= (3, 11)
    fix = None if ok else "install Python 3.11 or newer"
    return Finding("machine", "Python", ok, platform.python_version(), fix, needed=True)


def _torch() -> Finding:
    try:
        import torch

        from passdeploy.training import autocast_dtype
    except Exception as error:
        return Finding("machine", "torch", False, short(error), "pip install 'torch>=2.11'", needed=True)
    native = autocast_dtype(torch.device("cpu")) is not None
    halves = "this CPU multiplies bf16, so training uses it" if native else "no native bf16 on this CPU, trains in fp32"
    device = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    return Finding("machine", "torch", True, f"{torch.__version__} ({device}); {halves}", needed=True)


def _cpu() -> Finding:
    cores = f"{environment.usable_cores()} of {os.cpu_count()} logical cores usable"
    return Finding("machine", "CPU", True, f"{cpu_name()}, {cores}{', virtual' * environment.is_virtual()}")


def _governor() -> Finding:
    governor = environment.governor()
    if governor is None:
        return Finding("machine", "clock governor", True, "not said, as in most virtual machines")
    steady = governor == "performance"
    fix = None if steady else "for steadier latencies: sudo cpupower frequency-set -g performance"
    return Finding("machine", "clock governor", steady, governor, fix)


def _huge_pages() -> Finding:
    if huge_pages.used():
        return Finding("machine", "huge pages", True, "weights lie in huge pages; serve them so, too")
    advice = huge_pages.advice()
    if advice is None:
        return Finding("machine", "huge pages", True, "not to be had with this system or its C library")
    fix = f"faster where weights do not fit the caches, here and where they are served: {advice}"
    return Finding("machine", "huge pages", False, "weights lie in small pages", fix)


def _load() -> Finding:
    import psutil

    busy = psutil.cpu_percent(interval=0.5) / 100  # this process sleeps meanwhile
    average = environment.load_average()
    detail = f"{busy:.0%} of all cores busy" + ("" if average is None else f", load {average:.2f}")
    if busy <= NOISY:
        return Finding("machine", "other load", True, detail)
    return Finding("machine", "other load", False, f"{detail}: noisy", "stop other programs before measuring latencies")


def _memory() -> Finding:
    total = environment.memory_bytes()
    ok = total >= ENOUGH_MEMORY
    return Finding("machine", "memory", ok, f"{total / 2**30:.1f} GiB", None if ok else "the demo wants 3 GiB")


def _disk() -> Finding:
    try:
        folders = Path.cwd(), Path(tempfile.gettempdir())
        free = {folder: shutil.disk_usage(folder).free for folder in folders}
    except OSError as error:  # no folder for temporary files can be written, or this one was deleted
        fix = "free disk space, or set TMPDIR to a folder that can be written"
        return Finding("machine", "disk", False, str(error), fix)
    detail = ", ".join(f"{size / 2**30:.1f} GiB free in {folder}" for folder, size in free.items())
    if not os.access(Path.cwd(), os.W_OK):
        return Finding(
            "machine", "disk", False, f"{Path.cwd()} can't be written", "run from another folder, or use --out"
        )
    ok = min(free.values()) >= ENOUGH_DISK
    return Finding("machine", "disk", ok, detail, None if ok else "free 5 GiB, or set TMPDIR to a larger disk")


def _compiler() -> Finding:
    fix = "apt-get install g++, for the inductor backend and the kernels' tests"
    program = os.environ.get("CXX") or next((p for p in ("g++", "clang++", "c++") if shutil.which(p)), None)
    if program is None:
        return Finding("machine", "C++ compiler", False, "not found", fix)
    ok, said = run([program, "--version"])
    return Finding("machine", "C++ compiler", ok, said, None if ok else fix)


# --- the GPU ---


def _gpu() -> Finding:
    gpus = environment.nvidia_smi()
    if not gpus:
        return Finding(
            "GPU", "NVIDIA GPU", False, "none, or no driver", "engines for GPUs can be compiled here, not run"
        )
    names = ", ".join(f"{g['name']} ({g['memory']}, compute capability {g['compute_capability']})" for g in gpus)
    return Finding("GPU", "NVIDIA GPU", True, f"{names}, driver {gpus[0]['driver']}")


def _cuda_torch() -> Finding:
    name = "torch on the GPU"
    try:
        import torch

        there, count = torch.cuda.is_available(), torch.cuda.device_count()
    except Exception as error:
        return Finding("GPU", name, False, short(error), "pip install 'torch>=2.11'")
    if there:
        return Finding("GPU", name, True, f"CUDA {torch.version.cuda}, {count} device{'s' * (count > 1)}")
    if environment.nvidia_smi():
        return Finding("GPU", name, False, f"torch {torch.__version__} finds none", "pip install a CUDA build of torch")
    return Finding("GPU", name, False, "no GPU to use")


def _nvcc() -> Finding:
    fix = "install the CUDA toolkit 13, or use Dockerfile.gpu; NVRTC builds the kernels too"
    usual = Path("/usr/local/cuda/bin/nvcc")
    program = shutil.which("nvcc") or (str(usual) if usual.exists() else None)
    if program is None:
        return Finding("GPU", "nvcc", False, "not found", fix)
    ok, said = run([program, "--version"], pick=lambda line: "release" in line)
    return Finding("GPU", "nvcc", ok, said, None if ok else fix)


# --- data ---


def _data() -> list[Finding]:
    from passdeploy.data import cifar10, fashion_mnist, search_path

    fashion = [fashion_mnist._find(name) for name in fashion_mnist.FILES]
    cifar = [root / name for root in search_path() for name in (cifar10.JPEG_FILE, "cifar-10-batches-py")]
    places = {
        "fashion-mnist": fashion[0].parent if fashion[0] is not None and None not in fashion else None,
        "cifar10": next((path.parent for path in cifar if path.exists()), None),
    }
    fixes = {
        "fashion-mnist": "apt-get install dataset-fashion-mnist; else downloaded when first used",
        "cifar10": "put cifar-10-batches-py/ into a folder named in PASSDEPLOY_DATA",
    }
    return [
        Finding("data", name, place is not None, f"in {place}" if place else "not here", None if place else fixes[name])
        for name, place in places.items()
    ]


# --- targets ---


@dataclass(frozen=True)
class TargetRow:
    """A target as this machine sees it.

    Attributes:
        name: As typed after ``--target``.
        title: In words; the attached device's own name when there is one.
        compute_capability: "8.0"; None for a CPU.
        attached: Whether this machine has it, so that latencies can be measured.
        backend: The one that compiles for it here unless another is asked for; None when none can.
        measures: Whether the engine can be run and timed here.
        reason: Why there is no backend, or why it can't be measured.
    """

    name: str
    title: str
    compute_capability: str | None
    attached: bool
    backend: str | None
    measures: bool
    reason: str | None


def list_targets() -> list[TargetRow]:
    """All named targets, with what this machine can do for each; the first GPU by its own name where there is one."""
    return [_row(device) for device in (*DEVICES.values(), *([get_device(ANY_GPU)] if attached_gpus() else []))]


def _row(device: Device) -> TargetRow:
    from passdeploy.engines.base import first_available

    own = attached_device(device)
    title, capability = own or device.title, device.compute_capability
    if reason := not_first(device):
        return TargetRow(device.name, title, capability, False, None, False, reason)
    target = Target(device.name, title, capability, device.backends[0], device.precision, 1, 1, own is not None)
    try:
        backend = first_available(device.backends, target)
    except PassdeployError as error:
        return TargetRow(device.name, title, capability, own is not None, None, False, str(error))
    target = target.with_(backend=backend.name)
    reason = backend.runnable(target)
    return TargetRow(device.name, title, capability, own is not None, backend.name, reason is None, reason)


def _targets(rows: Sequence[TargetRow]) -> list[Finding]:
    """What this machine can measure on, compile for, and neither."""
    measured = [row.name for row in rows if row.measures]
    compiled = [f"{row.name} ({row.backend})" for row in rows if row.backend and not row.measures]
    neither = [row for row in rows if row.backend is None]
    findings = [
        Finding("targets", "measures on", bool(measured), ", ".join(measured) or "none", needed=True),
        Finding("targets", "compiles for", bool(compiled or measured), ", ".join(compiled) or "no others"),
    ]
    if neither:
        names = ", ".join(row.name for row in neither)
        findings.append(Finding("targets", "neither", False, names, "passdeploy targets says why"))
    return findings


def render_targets(rows: Sequence[TargetRow]) -> RenderableType:
    """A table of the targets."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("target", "device", "compute capability", "attached", "backend", "here"):
        table.add_column(column, overflow="fold", no_wrap=column in ("target", "backend"))
    for row in rows:
        if row.measures:
            here = "compiled and measured"
        elif row.backend and not row.attached:
            here = "compiled, not measured"
        else:
            here = f"compiled, not measured: {row.reason}" if row.backend else row.reason or ""
        table.add_row(
            row.name,
            escape(row.title),
            row.compute_capability or "",
            "[green]yes[/green]" if row.attached else "no",
            row.backend or "none",
            escape(here),
        )
    return table
