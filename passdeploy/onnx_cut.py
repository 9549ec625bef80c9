"""How one initialiser of an exported graph is cut: as surgery would slice the parameter it came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from passdeploy.groups.attention import Attention, describe


def _cut_heads(array: np.ndarray, kind: str, spec: Attention, kept: Sequence[int]) -> np.ndarray:
    """Slices what an attention keeps per head: packed projections by their rows or columns, tables along an axis."""
    if kind.startswith("axis"):
        return array.take(kept, int(kind.split()[1]))
    return array.take(sorted(row for head in kept for row in spec.rows(head)), 0 if kind == "rows" else 1)


def cut_array(array: np.ndarray, kind: str, module: nn.Module, entry: Mapping[str, Any]) -> np.ndarray:
    """Slices one initialiser of a module as surgery would slice the parameter."""
    outside = entry["out"]["kept"] if "out" in entry else None
    inside = entry["in"]["kept"] if "in" in entry else None
    spec = describe(module)
    if spec is not None:
        return array if outside is None else _cut_heads(array, kind, spec, outside)
    if kind == "transposed":
        array = array if inside is None else array.take(inside, 0)
        return array if outside is None else array.take(outside, 1)
    if kind == "slopes":
        return array if outside is None else array.take(outside, 1)
    if kind != "weight" or not isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
        return array if outside is None else array.take(outside, 0)
    in_dimension, out_dimension = (0, 1) if getattr(module, "transposed", False) else (1, 0)
    if getattr(module, "groups", 1) > 1:
        assert isinstance(module, nn.modules.conv._ConvNd)
        if outside is None:
            return array
        if module.transposed:
            each_out, each_in = module.out_channels // module.groups, module.in_channels // module.groups
            kept = np.unique(np.asarray(outside) // each_out)
            outside = (kept[:, None] * each_in + np.arange(each_in)).reshape(-1)
        return array.take(outside, 0)
    if inside is not None:
        array = array.take(inside, in_dimension)
    if outside is not None:
        array = array.take(outside, out_dimension)
    return array
