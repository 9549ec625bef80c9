"""From what the stages return to sections of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from passdeploy.reporting.schema import Distribution, GroupInfo, Latency

if TYPE_CHECKING:
    from passdeploy.groups.operators import Operator
    from passdeploy.groups.types import Groups
    from passdeploy.latency.measure import Measurement
    from passdeploy.structure import Structure


def latency_section(measurement: Measurement, enqueue_ms: float | None = None) -> Latency:
    """A measured latency as it stands in the report."""
    return Latency(
        p50=measurement.p50,
        p90=measurement.p90,
        p99=measurement.p99,
        mean=measurement.mean,
        n=measurement.n,
        spread=measurement.spread,
        disturbed_blocks=measurement.disturbed,
        enqueue_ms=enqueue_ms,
    )


def distribution_section(dense: Measurement, pruned: Measurement) -> Distribution:
    """The calls of both engines, thinned out to what a report holds."""
    return Distribution.of(dense.samples, pruned.samples)


def group_sections(
    groups: Groups,
    structure: Structure,
    operators: Sequence[Operator] = (),
    share_latency: Mapping[str, float] | None = None,
) -> list[GroupInfo]:
    """One entry per group in topological order.

    Args:
        groups: Of the network.
        structure: What was kept. Groups inside a removed block count as kept: 0.
        operators: For the shares of MACs: those of the operators whose input or output channels a group owns (shares of
            neighbours overlap), or which a residual block removes.
        share_latency: By group, of the dense engine's latency, when it is known.
    """
    from passdeploy.groups.operators import macs

    whole = macs(operators) if operators else 0.0
    widths = structure.widths()
    gone = {
        name
        for group in groups.groups
        if group.kind == "depth" and not widths[group.name]
        for name in groups.inner(group)
    }
    result = []
    for index, group in enumerate(groups.groups):
        touched = [
            op for op in operators if index in op.gates or any(index == g for g, _ in (*op.in_units, *op.out_units))
        ]
        members = group.branch or tuple(dict.fromkeys(member.module for member in group.members))
        result.append(
            GroupInfo(
                name=group.name,
                kind=group.kind,
                units=group.units,
                kept=0 if group.name in gone else widths[group.name],
                members=list(members),
                share_macs=min(macs(touched) / whole, 1.0) if whole else None,
                share_latency=None if share_latency is None else share_latency.get(group.name),
            )
        )
    return result
