"""Accuracy against latency: where dense, pruned and what a user would do instead stand, and where the budget lies."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from passdeploy.reporting import format as f
from passdeploy.reporting.plots.svg import Labels, Scale, chart, padded, path, tag, text, tip, x_axis, y_axis
from passdeploy.reporting.schema import AccuracyPoint, Report
from passdeploy.reporting.verdict import budget_ms, metric, percentile_ms, subject

WIDTH, HEIGHT = 520.0, 350.0
LEFT, RIGHT, TOP, BOTTOM = 50.0, 12.0, 14.0, 50.0


_METHOD_KINDS = ("pruned", "alternative", "imported")  # a shape and a colour per method; further ones share the last


@dataclass(frozen=True)
class Mark:
    """A point that is drawn: x in the axis's unit, y a share."""

    label: str
    kind: str
    x: float
    y: float


def points_of(report: Report) -> list[AccuracyPoint]:
    """The report's points; dense and pruned at least, when the section is absent."""
    if report.accuracy_points:
        return report.accuracy_points
    dense = report.dense
    result = [
        AccuracyPoint(
            label="dense",
            kind="dense",
            accuracy=dense.accuracy,
            latency_ms=percentile_ms(report, "dense"),
            macs=dense.macs,
        )
    ]
    if report.pruned is not None:
        pruned, latency = report.pruned, percentile_ms(report, "pruned")
        result.append(
            AccuracyPoint(label="pruned", kind="pruned", accuracy=pruned.accuracy, latency_ms=latency, macs=pruned.macs)
        )
    return result


def over_latency(report: Report) -> bool:
    """Whether the figure is over latency: not where only something else than the two networks was measured."""
    return any(p.latency_ms is not None for p in points_of(report) if p.kind in ("dense", "pruned"))


def plane(report: Report) -> Markup | None:
    """The figure, over latency where it was measured and over MACs where it was not; None with nothing to show."""
    given, measured = points_of(report), over_latency(report)
    marks = [
        Mark(p.label, p.kind, x, p.accuracy)
        for p in given
        if p.accuracy is not None and (x := p.latency_ms if measured else p.macs) is not None
    ]
    if not marks:
        return None
    unit, factor = _unit(max(mark.x for mark in marks), measured)
    title = f"{report.budget.percentile} latency per call, {unit}" if measured else f"MACs per image, {unit}"
    budget = budget_ms(report) if measured else None
    return _draw(marks, title, factor, budget, metric(report), arrow=True)


def comparison_plane(reports: Sequence[Report], narrow: bool = False) -> Markup | None:
    """Several runs in one plane: the pruned networks, the dense ones they came from, the best trade-offs joined."""
    marks: list[Mark] = []
    methods = list(dict.fromkeys(report.method for report in reports))
    seen: set[tuple[float, float]] = set()
    for report in reports:
        for side, network in (("dense", report.dense), ("pruned", report.pruned)):
            latency = percentile_ms(report, "dense" if side == "dense" else "pruned")
            if network is None or network.accuracy is None or latency is None:
                continue
            label = report.budget.asked if side == "pruned" else "dense"
            if side == "pruned" and len({r.method for r in reports}) > 1:
                label = f"{report.method} {label}"
            if side == "pruned" and len({subject(r) for r in reports}) > 1:
                label = f"{subject(report)} {label}"
            if side == "dense" and any(abs(latency / x - 1) < 0.03 and y == network.accuracy for x, y in seen):
                continue  # the same dense network, measured again
            seen.add((latency, network.accuracy))
            kind = side if side == "dense" else _METHOD_KINDS[min(methods.index(report.method), 2)]
            marks.append(Mark(label, kind, latency, network.accuracy))
    if not marks:
        return None
    unit, factor = _unit(max(mark.x for mark in marks), True)
    title = f"{reports[0].budget.percentile} latency per call, {unit}"
    return _draw(marks, title, factor, None, metric(reports[0]), front=True, width=WIDTH if narrow else 2 * WIDTH)


def pareto(marks: Sequence[Mark]) -> list[Mark]:
    """Those that no other beats on both axes (less x, more y), by rising x."""
    front: list[Mark] = []
    for mark in sorted(marks, key=lambda m: (m.x, -m.y)):
        if not front or mark.y > front[-1].y:
            front.append(mark)
    return front


def _unit(largest: float, is_time: bool) -> tuple[str, float]:
    if is_time:
        return ("ms", 1.0) if largest >= 1 else ("µs", 1000.0)
    return next(((u, s) for u, s in (("G", 1e-9), ("M", 1e-6), ("k", 1e-3)) if largest * s >= 1), ("", 1.0))


def _draw(
    marks: Sequence[Mark],
    title: str,
    factor: float,
    budget: float | None,
    accuracy: str,
    arrow: bool = False,
    front: bool = False,
    width: float = WIDTH,
) -> Markup:
    right, bottom = width - RIGHT, HEIGHT - BOTTOM
    xs = [mark.x * factor for mark in marks] + ([budget * factor] if budget is not None else [])
    x = Scale(0, max(xs) * 1.16, LEFT, right)
    final = [mark.y * 100 for mark in marks if mark.kind != "before_finetune"] or [mark.y * 100 for mark in marks]
    low, high = padded(final, 0.25, 2.4)
    y = Scale(low, min(high, 100.5), bottom - 8, TOP + 22)
    parts: list[Markup] = []
    if budget is not None:
        line = x(budget * factor)
        parts += [
            tag("rect", x=LEFT, y=TOP + 8, width=line - LEFT, height=bottom - TOP - 8, class_="inside"),
            tag("line", x1=line, x2=line, y1=TOP + 8, y2=bottom, class_="budget"),
            text(f"budget {f.milliseconds(budget)}", max(line, LEFT + 24), TOP + 2, "t strong budget-t", "middle"),
        ]
    parts += [*y_axis(y, LEFT, right), *x_axis(x, bottom, bottom, title)]
    crowded = budget is not None and x(budget * factor) < LEFT + 160  # the budget's label stands at the left
    at = right if crowded else LEFT - 44
    parts.append(text(f"{accuracy}, %", at, TOP + 2, "t title", "end" if crowded else None))
    if front:
        line_points = [(x(m.x * factor), y(m.y * 100)) for m in pareto(marks)]
        parts.append(path(line_points, "front"))
    labels = Labels((LEFT, TOP + 10, right, bottom))
    if front:
        for start, end in itertools.pairwise(line_points):
            labels.block_line(start, end)
    for mark in marks:
        labels.block(x(mark.x * factor), _inside(y, mark.y), 8)
    if budget is not None:
        labels.block(x(budget * factor), TOP, 4)
    if arrow:
        parts += _arrow(marks, x, y, factor, labels)
    for mark in sorted(marks, key=lambda m: m.kind != "pruned"):
        parts.append(
            _mark(mark, x(mark.x * factor), _inside(y, mark.y), y(mark.y * 100) > y.start, title, factor, labels)
        )
    said = "; ".join(f"{m.label}: {f.percent(m.y)} at {m.x * factor:.4g}" for m in marks)
    return chart(
        f"{accuracy} against {title}. {said}", width, HEIGHT, *parts, class_="chart" if width == WIDTH else "chart full"
    )


def _inside(y: Scale, accuracy: float) -> float:
    """The height of a share; what lies below the axis is drawn at its foot (its label says how low it really is)."""
    return min(y(accuracy * 100), y.start)


def _arrow(marks: Sequence[Mark], x: Scale, y: Scale, factor: float, labels: Labels) -> list[Markup]:
    """From dense to pruned, and up from before fine-tuning; labels keep off these lines."""
    at = {mark.kind: (x(mark.x * factor), _inside(y, mark.y)) for mark in reversed(marks)}
    parts = []
    for start, end, style in (("dense", "pruned", "move"), ("before_finetune", "pruned", "move dotted")):
        if start in at and end in at:
            parts.append(path([at[start], at[end]], style))
            labels.block_line(at[start], at[end])
    return parts


def _mark(mark: Mark, x: float, y: float, low: bool, title: str, factor: float, labels: Labels) -> Markup:
    shapes = {
        "dense": tag("circle", cx=x, cy=y, r=6.5, class_="m dense"),
        "pruned": tag("path", d=f"M{x:.1f} {y - 9:.1f}l9 9l-9 9l-9-9Z", class_="m pruned"),
        "before_finetune": tag("path", d=f"M{x:.1f} {y:.1f}l-6-9h12Z", class_="m before")
        if low
        else tag("circle", cx=x, cy=y, r=5, class_="m before"),
        "imported": tag("rect", x=x - 5, y=y - 5, width=10, height=10, class_="m other"),
    }
    triangle = tag("path", d=f"M{x:.1f} {y - 7:.1f}l7 12.5h-14Z", class_="m other")
    lines = [mark.label, f"{mark.y * 100:.2f} %" + (", below this axis" if low else "")]
    left, baseline, anchor = labels.place(lines, x, y)
    shown = [
        text(line, left, baseline + 15 * i, "t halo" + (" strong" if mark.kind == "pruned" else ""), anchor)
        for i, line in enumerate(lines)
    ]
    return tip(
        f"{mark.label}: {f.percent(mark.y)}; {title}: {mark.x * factor:.4g}", shapes.get(mark.kind, triangle), *shown
    )
