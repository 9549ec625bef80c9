"""What the command line prints at the end of a run, and the tables of `groups` and `verify`."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from passdeploy.data.base import ArraySplit, Augmentation, ImageData, Preprocess
from passdeploy.errors import BadInput, PassdeployError
from passdeploy.groups import ChannelGroup, macs
from passdeploy.groups.check import first_line
from passdeploy.reporting.alternatives import said as alternatives_said
from passdeploy.reporting.format import milliseconds
from passdeploy.reporting.schema import Report
from passdeploy.reporting.verdict import numbers, verdict
from passdeploy.shares import latency_shares, mac_shares
from passdeploy.subject import Subject, load_subject

if TYPE_CHECKING:
    from passdeploy.config import RunConfig
    from passdeploy.latency.measurement import Comparison
    from passdeploy.layers import LayerTimes

SIZES = ((224, 224), (32, 32))
"""Of the blank images that are tried where none is configured."""
IMAGENET_CLASSES = 1000


def offered(folder: Path) -> list[Path]:
    """What to look at in a run's folder, and what to ship."""
    return [path for path in (folder / "report.html", folder / "bundle") if path.exists()]


def render(report: Report) -> RenderableType:
    """Verdict, and dense against pruned."""
    said = verdict(report)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("", "dense", "pruned", "change"):
        table.add_column(heading, justify="left" if not heading else "right")
    for row in numbers(report):
        table.add_row(*row)
    messages = [Text(message) for message in report.messages or []]
    if report.alternatives is not None:
        messages.append(Text(alternatives_said(report)))
    good = report.goal_met
    return Panel(
        Group(Text(said.headline, style="bold"), Text(""), table, *messages),
        title=report.status,
        border_style="green" if good else "red",
        expand=False,
    )


def network_groups(config: RunConfig) -> Subject:
    """The network and data of a configuration, with their groups; blank images stand in for data that is not named."""
    return load_subject(config, data=None if config.data else _blank(config))


def _blank(config: RunConfig) -> ImageData:
    """As many classes as the model has by itself, images as large as was configured or as it takes."""
    from passdeploy import models

    model = str(config.model)
    takes = inspect.signature(models.factory(model)).parameters.get("num_classes")
    classes = takes.default if takes is not None and isinstance(takes.default, int) else IMAGENET_CLASSES
    # Our own networks are for small images; others are built for ImageNet's size or for small ones, and some take no
    # other.
    sizes = SIZES[::-1] if model in models._REGISTRY else SIZES
    for size in [config.input_size] if config.input_size else sizes:
        try:
            with torch.no_grad():
                outputs = models.build(model, classes, size).eval()(torch.zeros(1, 3, *size))
            break
        except PassdeployError:
            raise
        except Exception as error:
            why = f"{size[0]}x{size[1]}: {first_line(error)}"
    else:
        raise BadInput(
            f"--model {model}: takes no blank images ({why}); give --data, or input_size in the configuration"
        )
    dense = isinstance(outputs, torch.Tensor) and outputs.ndim == 4
    labels = torch.zeros(1, *(size if dense else ()), dtype=torch.long)
    image = ArraySplit(torch.zeros(1, 3, *size, dtype=torch.uint8), labels)
    names = tuple(str(i) for i in range(outputs.shape[1] if isinstance(outputs, torch.Tensor) else classes))
    return ImageData("blank images", names, Preprocess(size), Augmentation(), image, image, image)


def _latency_shares(subject: Subject) -> list[float] | None:
    """By the profile; None without one."""
    file = subject.config.profile_file
    if file is None:
        return None
    from passdeploy.latency.model import LatencyModel

    model = LatencyModel.load(Path(file), subject.operators, list(subject.groups.units.values()))
    return latency_shares(subject.groups, model)


def _bounds(group: ChannelGroup) -> str:
    if group.fixed is not None:
        return f"fixed at {group.fixed}"
    return f"at least {group.least}" if group.least > 1 else ""


def groups_to_json(subject: Subject) -> dict[str, Any]:
    """Groups, what can't be pruned and why."""
    latency, shares = _latency_shares(subject), mac_shares(subject.groups, subject.operators)
    entries = []
    for index, (group, share) in enumerate(zip(subject.groups.groups, shares, strict=True)):
        members = [{"module": m.module, "side": m.side, "channels": m.size} for m in group.members]
        entry = {
            "name": group.name,
            "kind": group.kind,
            "units": group.units,
            "share_macs": round(share, 4),
            "share_latency": None if latency is None else round(latency[index], 4),
            "least": 0 if group.kind == "depth" else group.least,
            "fixed": group.fixed,
            "members": list(group.branch) if group.kind == "depth" else members,
        }
        entries.append(entry)
    return {
        "model": subject.name,
        "macs": float(macs(subject.operators)),
        "groups": entries,
        "frozen": dict(subject.groups.frozen),
    }


def groups_table(subject: Subject) -> RenderableType:
    """One row per group."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    latency, shares = _latency_shares(subject), mac_shares(subject.groups, subject.operators)
    headings = [("group", "left"), ("units", "right"), ("MACs touched", "right"), ("members", "left")]
    if latency is not None:
        headings.insert(3, ("latency saved at most", "right"))
    for heading, justify in headings:
        table.add_column(heading, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for index, (group, share) in enumerate(zip(subject.groups.groups, shares, strict=True)):
        names = list(group.branch) if group.kind == "depth" else sorted({member.module for member in group.members})
        units = "block" if group.kind == "depth" else str(group.units)
        bounds = _bounds(group)
        cells = [f"{units} ({bounds})" if bounds else units, f"{share:.1%}"]
        if latency is not None:
            cells.append(f"{latency[index]:.1%}")
        table.add_row(Text(group.name), *cells, Text(", ".join(names), style="dim"))
    frozen = [Text(f"whole: {name} ({why})", style="dim") for name, why in subject.groups.frozen.items()]
    return Group(table, *frozen)


def bench_table(comparison: Comparison) -> RenderableType:
    """One row per engine; ratios are to the first."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("engine", overflow="fold")
    for heading in ("p50", "p90", "p99", "calls", "times as fast", "95 % interval", "verdict"):
        table.add_column(heading, justify="right")
    for name, m in comparison.measurements.items():
        row = [milliseconds(m.p50), milliseconds(m.p90), milliseconds(m.p99), str(m.n)]
        if name == comparison.reference:
            row += ["reference", "", ""]
        else:
            ratio = comparison.ratio(name)
            row += [f"{ratio.value:.3f}", f"{ratio.low:.3f} to {ratio.high:.3f}", comparison.verdict(name)]
        table.add_row(Text(name), *row)
    noisy = [name for name, m in comparison.measurements.items() if m.noisy]
    notes = (
        [Text(f"The machine was disturbed while {', '.join(noisy)} ran: measure again.", style="yellow")]
        if noisy
        else []
    )
    return Group(table, *notes)


def layer_table(engines: list[str], parts: Sequence[LayerTimes]) -> RenderableType:
    """One row per part of the network, one column per engine: milliseconds by the runtime's profiler."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("part", overflow="fold")
    for engine in engines:
        table.add_column(Text(engine), justify="right", overflow="fold")
    for part in parts:
        table.add_row(Text(part.name), *(milliseconds(ms) if ms else "" for ms in part.ms))
    table.add_row("all", *(milliseconds(sum(part.ms[i] for part in parts)) for i in range(len(engines))), style="bold")
    return Group(table, Text("Being watched takes time: the sums exceed the latencies below.", style="dim"), Text())
