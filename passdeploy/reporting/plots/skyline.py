"""The structure in one picture: a column per channel group in network order, the residual blocks under them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from passdeploy.reporting import format as f
from passdeploy.reporting.plots.svg import Scale, chart, tag, text, tip, y_axis
from passdeploy.reporting.schema import GroupInfo
from passdeploy.reporting.verdict import removed_with_block

HEIGHT = 276.0
LEFT, TOP, BASE, BLOCKS = 46.0, 26.0, 222.0, 236.0


@dataclass(frozen=True)
class Slot:
    """A place on the x axis: a channel group's column, or a residual block that has no column of its own under it."""

    group: GroupInfo
    start: float
    end: float


def skyline(groups: Sequence[GroupInfo], width: float = 1080.0) -> Markup | None:
    """Kept units (filled) beside the full width (pale), and which residual blocks are left; None without groups."""
    if not groups:
        return None
    inner, gone = _inside(groups), removed_with_block(groups)
    owners = [g for g in groups if g.kind == "channel" or not inner[g.name]]
    step = (width - LEFT - 4) / len(owners)
    gap = min(step * 0.22, 8.0)
    slots = {g.name: Slot(g, LEFT + i * step + gap / 2, LEFT + (i + 1) * step - gap / 2) for i, g in enumerate(owners)}
    columns = [g.units for g in groups if g.kind == "channel"]
    y = Scale(0, max(columns, default=1), BASE, TOP)
    parts: list[Markup] = []
    if columns:
        parts += [*y_axis(y, LEFT - 4, width - 4, 4), text("units", 2, 14, "t title")]
    for slot in slots.values():
        if slot.group.kind == "channel":
            parts.append(_column(slot, y, slot.group.name in gone))
    blocks = [g for g in groups if g.kind == "depth"]
    for group in blocks:
        under = [slots[name] for name in inner[group.name]] or [slots[group.name]]
        parts.append(_block(group, min(s.start for s in under), max(s.end for s in under)))
    parts.append(tag("line", x1=LEFT - 4, x2=width - 4, y1=BASE, y2=BASE, class_="axis"))
    kept = sum(g.kept for g in blocks)
    if blocks:
        parts.append(text("blocks", 0, BLOCKS + 16, "t title"))
    left = sum(g.kept for g in groups if g.kind == "channel" and g.name not in gone)
    label = f"{len(columns)} channel groups, {left} of {sum(columns)} units kept"
    if blocks:
        label += f"; {kept} of {len(blocks)} residual blocks kept"
    return chart(label, width, HEIGHT if blocks else BASE + 10, *parts, class_="chart full")


def _inside(groups: Sequence[GroupInfo]) -> dict[str, list[str]]:
    """Per residual block, the channel groups that live entirely in its branch."""
    result: dict[str, list[str]] = {}
    for block in groups:
        if block.kind == "depth":
            branch = set(block.members)
            result[block.name] = [
                g.name for g in groups if g.kind == "channel" and g.members and set(g.members) <= branch
            ]
    return result


def _column(slot: Slot, y: Scale, removed: bool) -> Markup:
    group, width = slot.group, slot.end - slot.start
    kept = 0 if removed else group.kept
    shapes = [
        tag("rect", x=slot.start, y=y(group.units), width=width, height=BASE - y(group.units), class_="full"),
        tag("rect", x=slot.start, y=y(kept), width=width, height=BASE - y(kept), class_="kept"),
    ]
    number = f.TIMES if removed else str(group.kept)
    if width >= 7.2 * len(number):
        shapes.append(text(number, (slot.start + slot.end) / 2, y(group.units) - 6, "t wide-only", "middle"))
    what = "removed with its block" if removed else f"{group.kept} of {group.units} units kept"
    return tip(f"{group.name}: {what}", *shapes)


def _block(group: GroupInfo, start: float, end: float) -> Markup:
    small = end - start < 12
    class_ = "block kept" if group.kept else "full" if small else "block gone"
    name = group.name.removeprefix("depth:")
    middle, width = (start + end) / 2, end - start
    shapes = [tag("rect", x=start, y=BLOCKS, width=width, height=24, rx=3, class_=class_)]
    if not group.kept and not small:
        arm = min(6.0, width / 3)
        top = f"{middle - arm:.1f} {BLOCKS + 12 - arm:.1f}l{2 * arm:.1f} {2 * arm:.1f}"
        cross = f"M{top}m0 {-2 * arm:.1f}l{-2 * arm:.1f} {2 * arm:.1f}"
        shapes.append(tag("path", d=cross, class_="cross"))
    elif group.kept and width >= 6.8 * len(name) + 4:
        shapes.append(text(name, middle, BLOCKS + 16, "t on-fill wide-only", "middle"))
    return tip(f"block {name}: {'kept' if group.kept else 'removed'}", *shapes)
