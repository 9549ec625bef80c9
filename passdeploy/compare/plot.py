"""Accuracy over measured speed-up (or over MACs), a line per method."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from passdeploy.compare.rows import Row
from passdeploy.compare.statistics import curve, judged, place, reference_of
from passdeploy.reporting.plots.svg import Labels, Scale, chart, padded, path, tag, text, tip, x_axis, y_axis

WIDTH, HEIGHT = 760.0, 420.0
LEFT, RIGHT, TOP, BOTTOM = 50.0, 12.0, 26.0, 50.0


def tradeoff(rows: Sequence[Row], split: str, reference: str | None = None) -> Markup | None:
    """The figure: means over seeds joined, single runs as small dots; None when nothing reached its budget."""
    reference = reference or reference_of(rows)
    rows = [judged(row) for row in rows]
    shown = [row for row in rows if row.split == split and row.accuracy is not None and place(row) is not None]
    if not shown:
        return None
    methods = sorted(dict.fromkeys(row.method for row in shown), key=lambda name: name == reference)
    curves = {method: curve(rows, method, split) for method in methods}
    # What is trained from scratch has no point of the dense network's.
    reached = {method: points[method != "scratch" :] for method, points in curves.items()}
    whole = [row.dense_accuracy for row in shown if row.method == methods[-1]]
    dense = (1.0, sum(whole) / len(whole)) if methods[-1] == "scratch" else curves[methods[-1]][0]
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    xs = [x for points in curves.values() for x, _ in points] + [float(place(row) or 1) for row in shown]
    ys = [100 * y for points in ([dense], *curves.values()) for _, y in points]
    ys += [100 * float(row.accuracy or 0) for row in shown]
    x = Scale(0.95, max(xs) + 0.28 * (max(xs) - 1 + 0.2), LEFT, right)
    low, high = padded(ys, 0.08, 1.0)
    y = Scale(low, min(high, 100.2), bottom, TOP)
    title = "measured speed-up over the dense engine" if shown[0].axis == "latency" else "times fewer MACs"
    parts = [*y_axis(y, LEFT, right), *x_axis(x, bottom, bottom, title)]
    parts.append(text(f"accuracy, %, {split}", 4, 14, "t strong"))
    labels = Labels((LEFT, TOP, right, bottom))
    for points in curves.values():
        for px, py in points:
            labels.block(x(px), y(100 * py), 6)
    for method in methods:
        points, main = curves[method], method == reference
        colour = "c0" if main else "c3"
        parts.append(path([(x(px), y(100 * py)) for px, py in points], f"curve {colour}"))
        for row in shown:
            if row.method == method:
                at = tag("circle", cx=x(float(place(row) or 1)), cy=y(100 * float(row.accuracy or 0)), r=2.2,
                         class_=f"dot {colour}", opacity="0.6")  # fmt: skip
                parts.append(
                    tip(f"{method}, {row.budget}, seed {row.seed}: {100 * float(row.accuracy or 0):.2f} %", at)
                )
        for px, py in reached[method]:
            shape = tag("circle", cx=x(px), cy=y(100 * py), r=4.5 if main else 3.5, class_=f"dot {colour}")
            parts.append(tip(f"{method}: {100 * py:.2f} % at {px:.2f}x", shape))
        lx, ly, anchor = labels.place([method], x(points[-1][0]), y(100 * points[-1][1]))
        parts.append(text(method, lx, ly, "t strong halo" if main else "t halo", anchor))
    parts.append(tip(f"dense: {100 * dense[1]:.2f} %", tag("circle", cx=x(1.0), cy=y(100 * dense[1]), r=6,
                                                           class_="m dense")))  # fmt: skip
    said = "; ".join(f"{m}: " + ", ".join(f"{100 * b:.2f} % at {a:.2f}x" for a, b in reached[m]) for m in methods)
    return chart(f"Accuracy over {title}. {said}", WIDTH, HEIGHT, *parts, class_="chart full")
