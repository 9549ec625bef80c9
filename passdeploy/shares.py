"""What hangs on each group: its shares of the dense network, as the report and `passdeploy groups` show them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from passdeploy.groups import ChannelGroup, Groups, Operator, macs, units_of


class Predictor(Protocol):
    """A latency model."""

    def predict_many(self, w: np.ndarray) -> np.ndarray:
        """Milliseconds [n] for kept units [n, groups]."""


def mac_shares(groups: Groups, operators: Sequence[Operator]) -> list[float]:
    """Of the dense MACs, what is in the operators that each group touches; these overlap."""
    total = float(macs(operators))
    shares = []
    for index in range(len(groups.groups)):
        touched = [
            op
            for op in operators
            if index in op.gates or any(group == index for group, _ in (*op.in_units, *op.out_units))
        ]
        shares.append(float(macs(touched)) / total if touched else 0.0)
    return shares


def latency_shares(groups: Groups, predictor: Predictor) -> list[float]:
    """Of the predicted dense latency, what goes when a group alone is at its smallest."""
    full = units_of(groups)
    rows = np.repeat(full[None], len(full), axis=0)
    for index, group in enumerate(groups.groups):
        rows[index, index] = _smallest(group)
    saved = 1 - predictor.predict_many(rows) / predictor.predict_many(full[None])[0]
    return [float(share) for share in np.clip(saved, 0, 1)]


def _smallest(group: ChannelGroup) -> int:
    """The fewest units that a pruned network can have of it."""
    if group.fixed is not None:
        return group.fixed
    return 0 if group.kind == "depth" else group.least
