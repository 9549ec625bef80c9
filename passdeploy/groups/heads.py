"""Turns the features inside an attention's stand-in into heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from passdeploy.groups.attention import VALUE, Attention
from passdeploy.groups.channels import UnionFind, Unit


def _merged(units: Sequence[Unit], specs: Mapping[str, Attention]) -> list[Unit]:
    """Units of the features of one head become one unit."""
    sets = UnionFind(len(units))
    first: dict[tuple[str, int], int] = {}
    for i, unit in enumerate(units):
        for (name, side), channels in unit.channels.items():
            base = name.removesuffix(f".{VALUE}")
            if base == name or side != "out":
                continue
            for channel in channels:
                sets.unite(first.setdefault((base, channel // specs[base].head_dim), i), i)
    merged: dict[int, Unit] = {}
    for i, unit in enumerate(units):
        into = merged.setdefault(sets.find(i), Unit())
        into.reason = into.reason or unit.reason
        for key, channels in unit.channels.items():
            into.channels[key] += channels
    return list(merged.values())


def with_heads(units: Sequence[Unit], specs: Mapping[str, Attention]) -> list[Unit]:
    """Units of a network with stand-ins as units of the network itself.

    Args:
        units: From `channel_units` on the network with stand-ins.
        specs: By qualified name, the attentions that stand-ins were put for.
    """
    result = []
    for unit in _merged(units, specs):
        own = Unit(reason=unit.reason)
        for (name, side), channels in unit.channels.items():
            base = name.removesuffix(f".{VALUE}")
            if base == name:
                own.channels[(name, side)] += channels
                continue
            spec = specs[base]
            if side == "out":
                heads = sorted({channel // spec.head_dim for channel in channels})
                own.channels[(base, "out")] += heads
                for part in spec.qkv:
                    own.channels[(f"{base}.{part}", "out")] += [row for head in heads for row in spec.rows(head)]
            for part in spec.qkv if side == "in" else ():
                own.channels[(f"{base}.{part}", "in")] += channels
            if side == "in" and not spec.qkv:
                own.reason = own.reason or f"its channels meet {base}: attention"
        result.append(own)
    return result
