"""Explains a structure: what hangs on each group, and why fewer MACs did not turn into the same speed-up."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from passdeploy.groups import Operator, macs
from passdeploy.reporting import schema as s
from passdeploy.shares import latency_shares, mac_shares
from passdeploy.stages.common import kept_widths
from passdeploy.stages.profile import stage_model
from passdeploy.structure import Structure

if TYPE_CHECKING:
    from passdeploy.pipeline import Run


def group_sections(run: Run, structure: Structure) -> list[s.GroupInfo]:
    """One entry per group: its members, what is kept of it, and its shares of the dense network."""
    groups = run.subject.groups
    by_macs, by_latency = mac_shares(groups, run.subject.operators), latency_shares(groups, stage_model(run))
    return [
        s.GroupInfo(
            name=group.name,
            kind=group.kind,
            units=group.units,
            kept=sum(structure.masks[group.name]),
            members=list(group.branch) if group.kind == "depth" else sorted({m.module for m in group.members}),
            share_macs=by_macs[g],
            share_latency=by_latency[g],
        )
        for g, group in enumerate(groups.groups)
    ]


def why_not_faster(
    run: Run,
    structure: Structure,
    latency_speedup: float | None,
    macs_speedup: float,
    measured_ms: float | None = None,
) -> list[s.Reason]:
    """Why fewer MACs did not turn into the same speed-up, from what the latency model says of the parts.

    Args:
        run: The run.
        structure: What is left of its network.
        latency_speedup: As measured, if it was.
        macs_speedup: In multiply-adds.
        measured_ms: Of the pruned engine, if it was measured: times of parts are shares of it.
    """
    predictor = stage_model(run)
    widths = kept_widths(run, structure)
    full = np.array([group.units for group in run.subject.groups.groups], dtype=float)
    pruned_ms = float(predictor.predict_many(widths[None].astype(float))[0])
    reasons = []
    if latency_speedup is not None and latency_speedup >= macs_speedup > 1:
        removed = any(group.kind == "depth" and not widths[g] for g, group in enumerate(run.subject.groups.groups))
        why = (
            "whole blocks were removed, and with them operators that cost time at any width"
            if removed
            else "it also moves less memory, and more of what it needs stays in the caches"
        )
        reasons.append(
            s.Reason(
                text=f"It is faster than its MACs say ({latency_speedup:.2f}x for {macs_speedup:.2f}x fewer): {why}."
            )
        )
    least = np.where(full == 1, full, 1.0)
    for g, group in enumerate(run.subject.groups.groups):
        if group.kind == "depth":
            least[g] = widths[g]
    share = float(np.clip(float(predictor.predict_many(least[None])[0]) / pruned_ms, 0, 1))
    reasons.append(
        s.Reason(
            text="Launch floor: what the remaining operators would still cost with a single channel each, "
            "predicted by the latency model.",
            share=share,
            value=share * (pruned_ms if measured_ms is None else measured_ms),  # of the latency that the report shows
            unit="ms",
        )
    )
    left = [op for op in run.subject.operators if not any(widths[g] == 0 for g in op.gates)]
    fixed = [op for op in left if not op.in_units and not op.out_units]
    if fixed:
        reasons.append(
            s.Reason(
                text=f"{len(fixed)} operators have no channels that can be removed (network inputs and outputs, layers "
                "that could not be traced or were left out); their share of the pruned network's multiplications.",
                share=float(np.clip(float(macs(fixed, widths)) / float(macs(run.subject.operators, widths)), 0, 1)),
            )
        )
    padded = _padding(run.subject.operators, widths, predictor.step)
    reasons.append(
        s.Reason(
            text=f"Padding: the target works in steps of {predictor.step} channels; this is the share of its "
            "multiplications that fill up narrower widths.",
            share=padded,
        )
    )
    return reasons


def _padding(ops: tuple[Operator, ...], widths: np.ndarray, step: int) -> float:
    """Share of the multiplications that only fill up widths to the next `step`."""
    useful = padded = 0.0
    for op in ops:
        if any(widths[g] == 0 for g in op.gates):
            continue
        cin = op.in_free + sum(int(widths[g]) * per for g, per in op.in_units)
        cout = op.out_free + sum(int(widths[g]) * per for g, per in op.out_units)
        height, width = op.in_hw if op.transposed else op.out_hw
        area = float(height * width * op.kernel[0] * op.kernel[1])
        if op.groups > 1:  # whole convolution groups go: what each output is a sum of stays as it is
            area, cin = area * op.cin / op.groups, 1
        useful += cin * cout * area
        rounded = [-(-c // step) * step if c > 3 else c for c in (cin, cout)]
        padded += rounded[0] * rounded[1] * area
    return float(np.clip(1 - useful / padded, 0, 1)) if padded else 0.0
