"""Per-layer control: the user's least, fixed and tied widths, by module name or pattern.

Widths are given in channels of the layer that is named (heads, when it is an attention), and become units of the group
that the layer's channels belong to. Every allocator takes its widths from one place, `search.allocator.width_grids`,
which keeps to them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from passdeploy.errors import BadInput, nearest
from passdeploy.groups.types import ChannelGroup, Groups, Member


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a module is named by a pattern, or lies inside a module that is."""
    return any(fnmatchcase(name, p) or fnmatchcase(name, f"{p}.*") for p in patterns)


def _named(group: ChannelGroup, pattern: str) -> Member | None:
    """The first layer of a group that a pattern names, as the producer of the group's channels."""
    return next((m for m in group.members if m.side == "out" and matches(m.module, [pattern])), None)


def _found(groups: Groups, pattern: str, key: str) -> list[tuple[int, ChannelGroup, Member]]:
    found = [(i, group, _named(group, pattern)) for i, group in enumerate(groups.groups) if group.kind == "channel"]
    hits = [(i, group, member) for i, group, member in found if member is not None]
    if hits:
        return hits
    frozen = next((why for name, why in groups.frozen.items() if matches(name, [pattern])), "")
    layers = {m.module for group in groups.groups for m in group.members if m.side == "out"}
    hint = f" ({frozen})" if frozen else nearest(pattern, layers)
    raise BadInput(f"groups.{key} {pattern!r}: names no layer whose width can change{hint}")


def _with_widths(groups: Groups, least: Mapping[str, int], fixed: Mapping[str, int]) -> Groups:
    changed = list(groups.groups)
    for pattern, width in least.items():
        for i, group, member in _found(groups, pattern, "min_width"):
            if not 1 <= width <= member.size:
                raise BadInput(
                    f"groups.min_width {pattern!r}: {width} is outside 1..{member.size}, "
                    f"the channels of {member.module}"
                )
            # where a layer's channels belong to several groups, or some to none, each group keeps its share of them
            units = math.ceil(width * group.units / member.size)
            changed[i] = dataclasses.replace(changed[i], least=max(changed[i].least, units))
    for pattern, width in fixed.items():
        for i, group, member in _found(groups, pattern, "fixed"):
            if group.units * member.per_unit != member.size:
                raise BadInput(
                    f"groups.fixed {pattern!r}: the {member.size} channels of {member.module} are not pruned together "
                    f"({group.units * member.per_unit} of them with {group.name}); give groups.min_width, or name a "
                    "layer in front of or behind it"
                )
            units, rest = divmod(width, member.per_unit)
            if rest or not 1 <= units <= group.units:
                raise BadInput(
                    f"groups.fixed {pattern!r}: {member.module} can have "
                    f"{member.per_unit}..{group.units * member.per_unit} channels in steps of {member.per_unit}, "
                    f"not {width}"
                )
            if changed[i].fixed not in (None, units):
                raise BadInput(f"groups.fixed {pattern!r}: {member.module} is fixed at another width already")
            if units < changed[i].least:
                raise BadInput(f"groups.fixed {pattern!r}: {width} is less than groups.min_width asks for")
            changed[i] = dataclasses.replace(changed[i], fixed=units)
    return Groups(tuple(changed), groups.frozen)


def _tied(groups: Groups, patterns: Sequence[str]) -> Groups:
    """The groups that the patterns name become one: unit i of one goes with unit i of the others."""
    chosen = sorted({i for pattern in patterns for i, _, _ in _found(groups, pattern, "tie")})
    first, *others = [groups.groups[i] for i in chosen]
    if not others:
        raise BadInput(f"groups.tie {', '.join(patterns)}: names a single group, {first.name}; name layers of several")
    for other in others:
        if other.units != first.units:
            raise BadInput(
                f"groups.tie {', '.join(patterns)}: {first.name} has {first.units} units, {other.name} has "
                f"{other.units}; only groups of the same width can be tied"
            )
    merged = dataclasses.replace(first, members=tuple(m for i in chosen for m in groups.groups[i].members))
    kept = [merged if i == chosen[0] else group for i, group in enumerate(groups.groups) if i not in chosen[1:]]
    return Groups(tuple(kept), groups.frozen)


def control(
    groups: Groups,
    *,
    min_width: Mapping[str, int] | None = None,
    fixed: Mapping[str, int] | None = None,
    tie: Sequence[Sequence[str]] = (),
) -> Groups:
    """Groups as the user wants them.

    Args:
        groups: From `find_groups`.
        min_width: By module name or pattern, the channels that must be left.
        fixed: By module name or pattern, the channels that the pruned network must have.
        tie: Sets of names or patterns whose groups keep the same units.

    Raises:
        BadInput: A pattern names no layer that can be pruned, or a width is not possible.
    """
    for patterns in tie:
        groups = _tied(groups, patterns)
    return _with_widths(groups, min_width or {}, fixed or {})
