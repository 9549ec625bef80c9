"""A network for the tests of the latency model, and a made-up machine that runs it."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

from passdeploy.groups import Groups, Operator, find_groups, operators
from passdeploy.models import build


@cache
def resnet20() -> tuple[Groups, tuple[Operator, ...]]:
    model = build("resnet20", 10).eval()
    example = torch.randn(1, 3, 32, 32)
    groups = find_groups(model, example)
    return groups, operators(model, example, groups)


def machine_ms(ops: tuple[Operator, ...], units: np.ndarray, w: np.ndarray, step: int = 16) -> float:
    """Latency on a machine that computes `step` output channels at a time and pays for every launch."""
    total = 0.01
    for op in ops:
        runs = np.prod([w[g] for g in op.gates]) if op.gates else 1
        cin = op.in_free + sum(w[g] * each for g, each in op.in_units)
        cout = op.out_free + sum(w[g] * each for g, each in op.out_units)
        area, kernel = op.out_hw[0] * op.out_hw[1], op.kernel[0] * op.kernel[1]
        macs = cin * np.ceil(cout / step) * step * area * kernel
        total += runs * (3e-8 * macs + 1e-7 * cin * op.in_hw[0] * op.in_hw[1] + 0.002 + (0.004 if cout % step else 0))
    return float(total)
