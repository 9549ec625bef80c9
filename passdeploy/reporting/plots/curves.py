"""Small panels, one per quantity that was recorded during the search or the fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from passdeploy.reporting.plots.svg import Scale, chart, padded, path, tag, text, tip, x_axis, y_axis
from passdeploy.reporting.schema import Curve

WIDTH, HEIGHT = 270.0, 170.0
LEFT, RIGHT, TOP, BOTTOM = 42.0, 8.0, 28.0, 26.0
_TITLES = {
    "loss": "loss",
    "accuracy": "training accuracy, %",
    "latency_ratio": "predicted latency / dense",
    "kept_blocks": "residual blocks kept",
    "kept_share": "units kept, %",
}
_PERCENT = ("accuracy", "kept_share")
_STEPS = ("kept_blocks",)


def curve_panels(curve: Curve, target_ratio: float | None = None) -> list[Markup]:
    """One panel per series; the wanted latency ratio is drawn into its panel."""
    panels = []
    for name, values in curve.series.items():
        points = [(s, v) for s, v in zip(curve.step, values, strict=True) if v is not None]
        if points:
            goal = target_ratio if name == "latency_ratio" else None
            panels.append(_panel(name, points, curve, goal))
    return panels


def _panel(name: str, points: Sequence[tuple[float, float]], curve: Curve, goal: float | None) -> Markup:
    factor = 100.0 if name in _PERCENT else 1.0
    shown = [(s, v * factor) for s, v in points]
    values = [v for _, v in shown] + ([goal] if goal is not None else [])
    low, high = padded(values, 0.08, 1.0 if name in _STEPS else 0.0)
    if min(values) >= 0:
        low = max(low, 0.0)
    x = Scale(curve.step[0], max(curve.step[-1], curve.step[0] + 1.0), LEFT, WIDTH - RIGHT)
    y = Scale(low, high, HEIGHT - BOTTOM, TOP)
    title = _TITLES.get(name, name.replace("_", " "))
    parts = [*y_axis(y, LEFT, WIDTH - RIGHT, 3), *x_axis(x, HEIGHT - BOTTOM, HEIGHT - BOTTOM, "", 3)]
    parts.append(text(title, 2, 14, "t strong"))
    if goal is not None:
        parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y(goal), y2=y(goal), class_="budget"))
    at = [(x(s), y(v)) for s, v in shown]
    if name in _STEPS:
        at = [p for i, (px, py) in enumerate(at) for p in (([(px, at[i - 1][1])] if i else []) + [(px, py)])]
    parts.append(path(at, "curve"))
    if len(shown) <= 30:
        for (s, v), (px, py) in zip(shown, [(x(s), y(v)) for s, v in shown], strict=True):
            parts.append(tip(f"{curve.unit} {s:g}: {v:.4g}", tag("circle", cx=px, cy=py, r=3.2, class_="dot")))
    last = shown[-1][1]
    parts.append(text(f"{last:.4g}", WIDTH - RIGHT, 14, "t title wide-only", "end"))
    label = f"{title} from {shown[0][1]:.4g} to {last:.4g} over {curve.step[-1]:g} {curve.unit}s"
    return chart(label, WIDTH, HEIGHT, *parts, class_="chart small")
