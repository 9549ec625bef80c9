"""A few lines of SVG: escaped tags, scales, ticks, axes, labels that keep out of each other's way."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

Box = tuple[float, float, float, float]
CHARACTER = 6.9  # px per character of a label at the largest font size that the page uses for the narrow screen
LINE = 15.0


def tag(name: str, *children: object, **attributes: object) -> Markup:
    """``tag("text", "a < b", x=1, text_anchor="end", class_="t")``: all is escaped; None attributes are left out."""
    parts = [Markup("<") + name]
    for key, value in attributes.items():
        if value is None:
            continue
        shown = f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value
        parts.append(Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), shown))
    if not children:
        return Markup("").join(parts) + Markup("/>")
    return Markup("").join([*parts, Markup(">"), *map(Markup.escape, children), Markup("</") + name + Markup(">")])


def chart(label: str, width: float, height: float, *children: object, class_: str = "chart") -> Markup:
    """A responsive figure; `label` is what a screen reader says."""
    view = f"0 0 {width:g} {height:g}"
    return tag("svg", *children, viewBox=view, role="img", aria_label=label, class_=class_, focusable="false")


def text(content: object, x: float, y: float, class_: str = "t", anchor: str | None = None) -> Markup:
    """A label whose baseline starts, ends or is centred at (x, y)."""
    return tag("text", content, x=x, y=y, class_=class_, text_anchor=anchor)


def tip(content: object, *shapes: object) -> Markup:
    """Shapes that show `content` when they are pointed at."""
    return tag("g", tag("title", content), *shapes)


def path(points: Iterable[tuple[float, float]], class_: str, close: bool = False) -> Markup:
    """A polyline."""
    d = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return tag("path", d=d + ("Z" if close else ""), class_=class_)


@dataclass(frozen=True)
class Scale:
    """Maps [low, high] linearly to [start, end] in px."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        span = self.high - self.low
        return self.start + (self.end - self.start) * ((value - self.low) / span if span else 0.5)

    def ticks(self, n: int = 5) -> list[float]:
        """About `n` round values inside the scale."""
        raw = (self.high - self.low) / max(n, 1)
        if raw <= 0:
            return [self.low]
        power = 10.0 ** math.floor(math.log10(raw))
        step = next((s * power for s in (1, 2, 2.5, 5) if s * power >= raw * 0.999), 10 * power)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [i * step for i in range(first, last + 1)]


def tick_labels(values: Sequence[float]) -> list[str]:
    """As few decimals as tell the ticks apart."""
    step = min((b - a for a, b in itertools.pairwise(values)), default=values[0] if values else 1.0) or 1.0
    decimals = max(0, -math.floor(math.log10(abs(step)) + 1e-9))
    if abs(step * 10**decimals - round(step * 10**decimals)) > 1e-6:
        decimals += 1  # steps of 2.5
    return [f"{value:.{decimals}f}" for value in values]


def x_axis(scale: Scale, y: float, top: float, title: str, n: int = 5) -> list[Markup]:
    """Ticks below `y`, faint grid lines up to `top`, the title at the right end."""
    values = scale.ticks(n)
    parts = [tag("line", x1=scale.start, x2=scale.end, y1=y, y2=y, class_="axis")]
    for value, label in zip(values, tick_labels(values), strict=True):
        x = scale(value)
        if top < y:
            parts.append(tag("line", x1=x, x2=x, y1=top, y2=y, class_="grid"))
        parts += [tag("line", x1=x, x2=x, y1=y, y2=y + 4, class_="axis"), text(label, x, y + 18, "t", "middle")]
    if title:
        parts.append(text(title, (scale.start + scale.end) / 2, y + 38, "t title", "middle"))
    return parts


def y_axis(scale: Scale, x: float, right: float, n: int = 4) -> list[Markup]:
    """Tick labels left of `x` and faint grid lines to `right`."""
    values = scale.ticks(n)
    parts = []
    for value, label in zip(values, tick_labels(values), strict=True):
        y = scale(value)
        parts += [
            tag("line", x1=x, x2=right, y1=y, y2=y, class_="grid"),
            text(label, x - 7, y + 4, "t", "end"),
        ]
    return parts


def padded(values: Sequence[float], share: float, at_least: float = 0.0) -> tuple[float, float]:
    """The range of `values`, widened by `share` on both sides and to a span of at least `at_least`."""
    low, high = min(values), max(values)
    missing = max(at_least - (high - low), 0) / 2
    margin = share * (high - low + 2 * missing) or 1.0
    return low - missing - margin, high + missing + margin


@dataclass
class Labels:
    """Places labels beside points so that they overlap neither each other nor other points, where there is room."""

    frame: Box
    taken: list[Box] = field(default_factory=list)

    def block(self, x: float, y: float, radius: float) -> None:
        """Keeps labels off a point."""
        self.taken.append((x - radius, y - radius, x + radius, y + radius))

    def block_line(self, start: tuple[float, float], end: tuple[float, float], steps: int = 16) -> None:
        """Keeps labels off a line."""
        for i in range(1, steps):
            at = i / steps
            self.block(start[0] + (end[0] - start[0]) * at, start[1] + (end[1] - start[1]) * at, 3)

    def place(self, lines: Sequence[str], x: float, y: float, gap: float = 11) -> tuple[float, float, str]:
        """Position of the first line's baseline and the anchor, for `lines` at the point (x, y)."""
        width, height = CHARACTER * max(map(len, lines)), LINE * len(lines)
        spots = [
            (x + gap, y - height / 2, "start"),
            (x - gap, y - height / 2, "end"),
            (x, y - gap - height, "middle"),
            (x, y + gap, "middle"),
            (x + gap, y - gap - height, "start"),
            (x + gap, y + gap, "start"),
            (x - gap, y - gap - height, "end"),
            (x - gap, y + gap, "end"),
        ]

        def box(spot: tuple[float, float, str]) -> Box:
            left = spot[0] - {"start": 0, "end": width, "middle": width / 2}[spot[2]]
            return left, spot[1], left + width, spot[1] + height

        best = min(spots, key=lambda spot: self._cost(box(spot)))
        self.taken.append(box(best))
        return best[0], best[1] + LINE * 0.78, best[2]

    def _cost(self, box: Box) -> float:
        outside = (
            max(self.frame[0] - box[0], 0)
            + max(self.frame[1] - box[1], 0)
            + max(box[2] - self.frame[2], 0)
            + max(box[3] - self.frame[3], 0)
        )
        overlap = sum(
            max(min(box[2], b[2]) - max(box[0], b[0]), 0) * max(min(box[3], b[3]) - max(box[1], b[1]), 0)
            for b in self.taken
        )
        return overlap + 40 * outside


def share_bar(share: float | None, class_: str = "fill", label: str = "") -> Markup:
    """A track with a filled part, as wide as its container."""
    filled = max(0.0, min(1.0, share or 0.0))
    return tag(
        "svg",
        tag("rect", width="100%", height="100%", rx=2, class_="track"),
        tag("rect", width=f"{filled:.2%}", height="100%", rx=2, class_=class_),
        class_="bar",
        role="img",
        aria_label=label or f"{filled:.0%}",
    )


def pair_bar(dense: float, pruned: float, largest: float) -> Markup:
    """Two bars, one above the other, as wide as their container where they are `largest`."""
    bars = [
        tag("rect", y=y, width=f"{value / largest if largest else 0:.2%}", height="44%", rx=1, class_=f"fill-{side}")
        for side, value, y in (("dense", dense, "0"), ("pruned", pruned, "56%"))
    ]
    return tag("svg", *bars, class_="bar pair", role="img", aria_label=f"{dense:.3g} and {pruned:.3g} ms")


def stage_bar(parts: Sequence[tuple[str, float]]) -> Markup:
    """One bar of labelled stretches that add up to the whole."""
    whole = sum(value for _, value in parts) or 1.0
    shapes, at = [], 0.0
    for index, (name, value) in enumerate(parts):
        share = value / whole
        shapes.append(
            tip(
                f"{name}: {value:.1f} s, {share:.0%}",
                tag("rect", x=f"{at:.3%}", width=f"{share:.3%}", height="100%", class_=f"part p{index % 6}"),
            )
        )
        at += share
    label = "Time: " + ", ".join(f"{name} {value:.1f} s" for name, value in parts)
    return tag("svg", *shapes, class_="bar stages", role="img", aria_label=label)
