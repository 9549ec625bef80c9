"""Latency of single calls of both engines: how long, how steady, and how far from the budget."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from passdeploy.reporting import format as f
from passdeploy.reporting.engines import Latency
from passdeploy.reporting.plots.svg import Scale, chart, tag, text, tip, x_axis
from passdeploy.reporting.schema import Report
from passdeploy.reporting.verdict import budget_ms

WIDTH, HEIGHT = 520.0, 350.0
LEFT, RIGHT = 10.0, 12.0
BINS = 44
HIDDEN = 0.02
"""Share of an engine's calls outside of its histogram from which on it is said."""


def distribution(report: Report) -> Markup | None:
    """Bars from zero on a common axis, a histogram of each engine's calls below; None when nothing was measured."""
    dense = report.dense.latency_ms
    pruned = report.pruned.latency_ms if report.pruned else None
    if dense is None or pruned is None:
        return None
    end = max(v for latency in (dense, pruned) for v in (latency.p50, latency.p90, latency.p99, 0.0) if v is not None)
    budget = budget_ms(report)
    scale = Scale(0, max(end, budget or 0) * 1.04, LEFT, WIDTH - RIGHT)
    parts: list[Markup] = []
    for latency, side, y in ((dense, "dense", 42.0), (pruned, "pruned", 84.0)):
        parts += _bar(latency, side, y, scale)
    if budget is not None:
        x = scale(budget)
        parts += [
            tag("line", x1=x, x2=x, y1=16, y2=108, class_="budget"),
            text(f"budget {f.milliseconds(budget)}", x, 10, "t strong budget-t", "middle"),
        ]
    samples = report.distribution
    if samples is not None and min(len(samples.dense), len(samples.pruned)) >= 10:
        low, high = _relative_range((samples.dense, samples.pruned))
        parts += _histogram(samples.dense, dense, "dense", 140.0, low, high)
        parts += _histogram(samples.pruned, pruned, "pruned", 252.0, low, high)
    else:
        samples = None
    label = (
        f"Latency of single calls. Dense: p50 {f.milliseconds(dense.p50)}, p99 {f.milliseconds(dense.p99)}. "
        f"Pruned: p50 {f.milliseconds(pruned.p50)}, p99 {f.milliseconds(pruned.p99)}."
    )
    return chart(label, WIDTH, HEIGHT if samples is not None else 124.0, *parts)


def _bar(latency: Latency, side: str, y: float, scale: Scale) -> list[Markup]:
    p50 = latency.p50 if latency.p50 is not None else latency.mean
    if p50 is None:
        return []
    parts = [
        text(f"{side}  {f.milliseconds(p50)}", scale.start, y - 8, "t strong"),
        tip(
            f"{side}: p50 {f.milliseconds(p50)}",
            tag("rect", x=scale.start, y=y, width=scale(p50) - scale.start, height=18, rx=2, class_=f"fill-{side}"),
        ),
    ]
    for percentile, height in (("p90", 10.0), ("p99", 10.0)):
        value = getattr(latency, percentile)
        if value is not None:
            x = scale(value)
            line = tag("line", x1=x, x2=x, y1=y + 9 - height, y2=y + 9 + height, class_=f"tickmark {side}")
            parts.append(tip(f"{side}: {percentile} {f.milliseconds(value)}", line))
    if latency.p99 is not None:
        parts.append(tag("line", x1=scale(p50), x2=scale(latency.p99), y1=y + 9, y2=y + 9, class_=f"whisker {side}"))
    return parts


def _median(ranked: Sequence[float]) -> float:
    return ranked[(len(ranked) - 1) // 2]


def _relative_range(engines: Sequence[Sequence[float]]) -> tuple[float, float]:
    """A range in medians that holds nearly all calls of every engine; one range, so that shapes can be compared."""
    lows, highs = [], []
    for values in engines:
        ranked = sorted(values)
        lows.append(ranked[len(ranked) // 200] / _median(ranked))
        highs.append(ranked[len(ranked) * 99 // 100] / _median(ranked))
    return max(min(lows) - 0.02, 0.3), min(max(highs) + 0.03, 4.0)


def _histogram(
    values: Sequence[float], latency: Latency, side: str, top: float, lowest: float, highest: float
) -> list[Markup]:
    ranked = sorted(values)
    middle = _median(ranked)
    low, high = middle * lowest, middle * highest
    factor, unit = (1.0, "ms") if middle >= 1 else (1000.0, "µs")
    x = Scale(low * factor, high * factor, LEFT, WIDTH - RIGHT)
    bottom = top + 64
    counts = [0] * BINS
    for value in ranked:
        index = math.floor((value - low) / (high - low) * BINS)
        if 0 <= index < BINS:
            counts[index] += 1
    peak = max(counts) or 1
    step = (x.end - x.start) / BINS
    parts = []
    for index, n in enumerate(counts):
        if n:
            height = n / peak * (bottom - top - 6)
            start = (low + (high - low) * index / BINS) * factor
            left = x.start + index * step
            shape = tag("rect", x=left, y=bottom - height, width=step - 1, height=height, class_=f"fill-{side}")
            parts.append(tip(f"from {start:.4g} {unit}: {n / len(ranked):.1%} of calls", shape))
    beyond = 1 - sum(counts) / len(ranked)
    label = f"{side}, {unit}" + (f"; {beyond:.0%} of calls lie outside" if beyond >= HIDDEN else "")
    taken = LEFT + (80.0 if beyond < HIDDEN else 220.0)
    for percentile in ("p50", "p90", "p99"):
        value = getattr(latency, percentile)
        if value is not None and low < value < high:
            at = x(value * factor)
            parts.append(tag("line", x1=at, x2=at, y1=top - 2, y2=bottom, class_="percentile"))
            if at - 14 > taken:
                parts.append(text(percentile, at, top - 6, "t", "middle"))
                taken = at + 14
    parts.append(text(label, LEFT, top - 6, "t strong"))
    return parts + x_axis(x, bottom, bottom, "", 6)
