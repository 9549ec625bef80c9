"""How one initialiser of an exported graph is cut: as surgery slices the parameter it came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from passdeploy.groups.attention import Attention, describe
from passdeploy.groups.channels import PRODUCERS, side_size
from passdeploy.surgery import weight_cuts


def _cut_heads(array: np.ndarray, kind: str, spec: Attention, kept: Sequence[int]) -> np.ndarray:
    """Slices what an attention keeps per head: packed projections by their rows or columns, tables along an axis."""
    if kind.startswith("axis"):
        return array.take(kept, int(kind.split()[1]))
    return array.take(spec.kept_rows(kept), 0 if kind == "rows" else 1)


def cut_array(array: np.ndarray, kind: str, module: nn.Module, entry: Mapping[str, Any]) -> np.ndarray:
    """Slices one initialiser of a module as surgery would slice the parameter."""
    outside = entry["out"]["kept"] if "out" in entry else None
    inside = entry["in"]["kept"] if "in" in entry else None
    spec = describe(module)
    if spec is not None:
        return array if outside is None else _cut_heads(array, kind, spec, outside)
    if kind in ("weight", "transposed") and isinstance(module, PRODUCERS):
        for dimension, kept in weight_cuts(module, outside, inside).items():
            array = array.take(kept, 1 - dimension if kind == "transposed" else dimension)
        return array
    if outside is None:
        return array
    if kind == "groups":
        channels = side_size(module, "out")
        assert channels is not None
        return array[: len(outside) * len(array) // channels]
    return array.take(outside, int(kind.split()[1]) if kind.startswith("axis") else 0)
