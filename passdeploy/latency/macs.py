"""Multiply-accumulates in the place of a latency model: what papers prune by, for comparisons at equal MACs.

It has a latency model's interface, so searches and allocators work on it unchanged; its "milliseconds" are MACs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from passdeploy.groups import Operator, macs

if TYPE_CHECKING:
    import torch

SCHEMA = "passdeploy.macs/1"
STEP = 8
"""Widths stay multiples of this, as engines like them."""


class MacsModel:
    """Counts instead of predicting.

    Args:
        operators: Of the network.
        units: Units per group.
    """

    step = STEP

    def __init__(self, operators: Sequence[Operator], units: Sequence[int]) -> None:
        self.operators = tuple(operators)
        self.dense_ms = float(macs(self.operators, np.asarray(units, dtype=float)))

    def predict_many(self, w: np.ndarray) -> np.ndarray:
        """MACs [n], for kept units [n, groups]."""
        counted: np.ndarray = macs(self.operators, np.asarray(w, dtype=float))
        return counted

    def predict(self, w: np.ndarray) -> float:
        """MACs for kept units [groups]."""
        return float(self.predict_many(np.asarray(w)[None])[0])

    def predict_soft(self, w: torch.Tensor) -> torch.Tensor:
        """MACs (a scalar) for fractional kept units [groups], differentiable."""
        total = 0 * w.sum()
        for op in self.operators:
            cin = op.in_free + sum(w[g] * each for g, each in op.in_units)
            cout = op.out_free + sum(w[g] * each for g, each in op.out_units)
            count = (op.cin / op.groups if op.groups > 1 else cin) * cout * op.kernel[0] * op.kernel[1]
            height, width = op.in_hw if op.transposed else op.out_hw
            for gate in op.gates:
                count = count * w[gate]
            total = total + count * height * width
        return total

    def summary(self) -> dict[str, Any]:
        """The report's ``predictor``."""
        return {"kind": "analytic", "mape": None, "max_ape": None, "n": 0, "repeatability": None}
