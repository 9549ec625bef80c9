"""Where the time goes in both engines, layer by layer: in words and as a table."""

from __future__ import annotations

from passdeploy.reporting import format as f
from passdeploy.reporting.schema import Report

HEAD = ("part", "dense", "pruned", "change")
NOTE = (
    "By the runtime's profiler: layers summed up by module; a layer that was fused with the next one goes by that "
    "one's name. Being watched takes time, so the sums exceed the latencies above."
)
NAMED = 3
"""So many of the parts that cost most are named in a sentence."""


def rows(report: Report) -> list[tuple[str, ...]]:
    """A row (as `HEAD`) for each part of the network, in the dense engine's order."""
    return [
        (
            part.name,
            f.milliseconds(part.dense_ms),
            f.milliseconds(part.pruned_ms) if part.pruned_ms else "gone",
            f.times(part.dense_ms / part.pruned_ms) if part.dense_ms and part.pruned_ms else "",
        )
        for part in report.layers or []
    ]


def said(report: Report) -> str:
    """What costs most in the pruned engine."""
    parts = report.layers or []
    whole = sum(part.pruned_ms for part in parts)
    if not whole:
        return ""
    most = sorted(parts, key=lambda part: -part.pruned_ms)[:NAMED]
    named = [f"{part.name} ({f.percent(part.pruned_ms / whole, 0)})" for part in most]
    listed = named[0] if len(named) == 1 else f"{', '.join(named[:-1])} and {named[-1]}"
    return f"What costs most in the pruned engine: {listed}."
