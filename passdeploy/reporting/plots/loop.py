"""The closed loop: what each candidate was predicted to reach, and what its engine measured."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from passdeploy.reporting import format as f
from passdeploy.reporting.plots.svg import Scale, chart, padded, path, tag, text, tip, y_axis
from passdeploy.reporting.schema import Candidate

WIDTH, HEIGHT = 520.0, 290.0
LEFT, RIGHT, TOP, BOTTOM = 50.0, 12.0, 34.0, 50.0
AIM = 1.06  # the loop aims at 1.00 to 1.06 times the asked speed-up


def closed_loop(candidates: Sequence[Candidate], asked: float | None) -> Markup | None:
    """Speed-up over the dense engine per turn; `asked` is the wanted one. None without candidates."""
    rows = [
        (
            i + 1,
            c,
            1 / c.predicted_ratio if c.predicted_ratio else None,
            1 / c.measured_ratio if c.measured_ratio else None,
        )
        for i, c in enumerate(candidates)
    ]
    values = [v for row in rows for v in row[2:] if v is not None]
    if not values:
        return None
    if asked is not None:
        values += [asked, asked * AIM]
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    x = Scale(0.5, len(rows) + 0.5, LEFT, right)
    y = Scale(*padded(values, 0.12, 0.1), bottom, TOP)
    parts: list[Markup] = [*y_axis(y, LEFT, right)]
    if asked is not None:
        parts += [
            tag(
                "rect", x=LEFT, y=y(asked * AIM), width=right - LEFT, height=y(asked) - y(asked * AIM), class_="inside"
            ),
            tag("line", x1=LEFT, x2=right, y1=y(asked), y2=y(asked), class_="budget"),
            text(f"asked {f.times(asked)}", right, y(asked) + 16, "t strong budget-t halo", "end"),
        ]
    parts += [
        tag("line", x1=LEFT, x2=right, y1=bottom, y2=bottom, class_="axis"),
        *[text(str(turn), x(turn), bottom + 18, "t", "middle") for turn, *_ in rows[:: max(1, len(rows) // 12)]],
        text("candidate", (LEFT + right) / 2, bottom + 38, "t title", "middle"),
        text("speed-up over the dense engine", LEFT - 44, 14, "t title"),
    ]
    for turn, _, predicted, measured in rows:
        if predicted is not None and measured is not None:
            parts.append(path([(x(turn), y(predicted)), (x(turn), y(measured))], "move"))
    for turn, candidate, predicted, measured in rows:
        if predicted is not None:
            shape = tag("circle", cx=x(turn), cy=y(predicted), r=5, class_="m before")
            parts.append(tip(f"candidate {turn}: predicted {f.times(predicted, 3)}", shape))
        if measured is not None:
            shape = tag("circle", cx=x(turn), cy=y(measured), r=6, class_="m pruned")
            parts.append(tip(f"candidate {turn}: measured {f.times(measured, 3)}", shape))
            if candidate.chosen:
                parts.append(tag("circle", cx=x(turn), cy=y(measured), r=11, class_="chosen"))
    said = "; ".join(f"{t}: predicted {f.times(p)}, measured {f.times(m)}" for t, _, p, m in rows)
    return chart(f"Candidates of the closed loop. {said}", WIDTH, HEIGHT, *parts)
