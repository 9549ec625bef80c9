"""What a reader of a report should know about its measurements."""

from __future__ import annotations

from typing import Any

from passdeploy.reporting import schema as s
from passdeploy.reporting.format import milliseconds

HOST_BOUND = 0.9
"""Share of the latency from which on enqueueing is as long as what is enqueued."""
DISTURBED = 0.08
"""On a quiet machine fresh processes lie at most half as far apart."""


def build_spread(rebuilds: s.RebuildsInfo | None) -> list[str]:
    """What a reader should know where another build would have been another engine."""
    if rebuilds is None or rebuilds.of != "builds" or rebuilds.spread is None:
        return []
    return [
        f"{rebuilds.n} builds of the same graph lie {rebuilds.spread:.1%} apart in latency; "
        "the one that was measured is the one that ships."
    ]


def host_bound(bench: dict[str, Any] | None) -> list[str]:
    """What a reader should know where the host, not the GPU, sets the pace of the engine that ships."""
    thin = (bench or {}).get("thin", {})
    host, device = thin.get("enqueue"), thin.get("p50")
    if host is None or device is None or host < HOST_BOUND * device:
        return []
    return [
        f"The host takes {milliseconds(host)} to enqueue an inference that takes the GPU {milliseconds(device)}: a "
        "server that asks for one after the other waits for the host; thinner layers will not help, larger batches may."
    ]


def disturbance(bench: dict[str, Any] | None) -> list[str]:
    """What a reader should know where fresh processes did not agree."""
    processes = (bench or {}).get("processes") or [1.0]
    apart = max(processes) / min(processes) - 1
    if apart <= DISTURBED:
        return []
    return [
        f"{len(processes)} processes found ratios that lie {apart:.0%} apart: the machine has something else to do, or "
        "others share its caches. What is quoted is their median, with its interval."
    ]
