"""A quantity over runs or commits, a line per configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from markupsafe import Markup

from passdeploy.reporting.plots.svg import Scale, chart, padded, path, tag, text, tip, y_axis

WIDTH, HEIGHT = 520.0, 260.0
LEFT, RIGHT, TOP, BOTTOM = 54.0, 14.0, 30.0, 44.0


def trend(title: str, ticks: Sequence[str], lines: Mapping[str, Sequence[float | None]]) -> Markup | None:
    """Draws `lines` (each as long as `ticks`, None where there is no value); None when there is nothing to draw."""
    values = [v for line in lines.values() for v in line if v is not None]
    if not values:
        return None
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    x = Scale(0, max(len(ticks) - 1, 1), LEFT + 8, right - 8)
    low, high = padded(values, 0.12)
    y = Scale(max(low, 0.0) if min(values) >= 0 else low, high, bottom, TOP)
    parts: list[Markup] = [*y_axis(y, LEFT, right), text(title, 4, 14, "t strong")]
    parts.append(tag("line", x1=LEFT, x2=right, y1=bottom, y2=bottom, class_="axis"))
    every = max(1, -(-len(ticks) // 6))
    parts += [text(ticks[i], x(i), bottom + 18, "t", "middle") for i in range(0, len(ticks), every)]
    for index, (name, line) in enumerate(lines.items()):
        points = [(i, v) for i, v in enumerate(line) if v is not None]
        if not points:
            continue
        parts.append(path([(x(i), y(v)) for i, v in points], f"curve c{index % 6}"))
        for i, v in points:
            dot = tag("circle", cx=x(i), cy=y(v), r=3.5, class_=f"dot c{index % 6}")
            parts.append(tip(f"{name}, {ticks[i]}: {v:.4g}", dot))
    said = "; ".join(
        f"{name}: last {next((v for v in reversed(line) if v is not None), 0):.4g}" for name, line in lines.items()
    )
    return chart(f"{title} over {len(ticks)} runs. {said}", WIDTH, HEIGHT, *parts)
