"""The bounds of the proofs that a thin network, its ONNX file and its engine compute the same function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from passdeploy.engines.base import TOLERANCE
from passdeploy.surgery import relative_difference

TOP1_AGREEMENT = 0.99
"""At least this share of the images must get the same class from the engine as from the ONNX file."""
AGREEMENT_IMAGES = 1000
"""On which that is judged below fp32; fewer where the validation split is smaller."""
UNBOUNDED = 1e9
"""What is recorded of outputs that are not finite, or not of the same shape: JSON has no infinity, and null would say
that nothing was checked."""


def exact(difference: float | None) -> bool:
    """Whether a step in fp32 is within its bound."""
    return difference is None or difference <= TOLERANCE["fp32"]


def proof_holds(proof: dict[str, Any]) -> bool:
    """Whether every step that was checked is within its bound."""
    in_fp32 = exact(proof["masked_vs_thin"]) and exact(proof["thin_vs_onnx"])
    engine = proof["onnx_vs_engine"] is None or proof["onnx_vs_engine"] <= proof["tolerance"]
    agree = proof["top1_agreement"] is None or proof["top1_agreement"] >= TOP1_AGREEMENT
    return in_fp32 and engine and agree


def recorded_difference(a: Tensor, b: Tensor) -> float:
    """max|a-b| / max|a|, at most `UNBOUNDED`: a number that JSON can hold and no bound lets pass."""
    return min(relative_difference(a, b), UNBOUNDED)


def array_difference(a: np.ndarray, b: np.ndarray) -> float:
    """`recorded_difference` of arrays."""
    return recorded_difference(torch.from_numpy(np.asarray(a)), torch.from_numpy(np.asarray(b)))


def in_batches(call: Callable[[np.ndarray], np.ndarray], images: np.ndarray, batch: int) -> np.ndarray:
    """Outputs [n, ...] for images [n, 3, H, W] of a function of (batch, 3, H, W); n is a multiple of `batch`."""
    return np.concatenate([call(images[i : i + batch]) for i in range(0, len(images), batch)])
