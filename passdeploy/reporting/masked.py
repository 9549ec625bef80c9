"""The masked engine beside the dense and the thin one: why surgery exists."""

from __future__ import annotations

from passdeploy.reporting import format as f
from passdeploy.reporting.schema import Report


def rows(report: Report) -> list[tuple[str, str, str]]:
    """Dense, masked and thin engine: name, p50, speed-up over the dense one; empty when that was not measured."""
    found = report.masked
    if found is None or found.masked is None:
        return []
    engines = (
        ("dense", found.dense, 1.0),
        ("masked", found.masked, found.speedup),
        ("thin", found.thin, found.thin_speedup),
    )
    return [
        (name, f.milliseconds(latency.p50 if latency else None), f.times(ratio)) for name, latency, ratio in engines
    ]


def said(report: Report) -> str:
    """What the masked engine shows, in a sentence."""
    assert report.masked is not None
    how = "the CUDA kernel's operator" if report.masked.kernel else "multiplications"
    return (
        f"The same network with its masks as {how} and every channel still there. It computes what the thin one does "
        f"(relative difference {report.masked.masked_vs_thin:.1e}); only surgery turns masks into time."
    )
