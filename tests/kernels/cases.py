"""Cases that the kernels are tried on: here by emulation, in tests/gpu on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Largest difference, relative to the largest value: a few roundings of the type."""

INPUT_TOLERANCE = {**TOLERANCE, torch.float32: 1e-5}
"""A sampling position is a float32 of up to 40 pixels here; its rounding moves a black-to-white edge by this much."""

SHAPES = (
    (1, 1, 1, 1),
    (2, 3, 1, 1),
    (2, 5, 7, 7),  # planes out of step with packets
    (3, 4, 2, 2),  # several planes in a packet
    (1, 17, 3, 5),
    (2, 16, 8, 8),
    (2, 24, 4, 4),
    (1, 65, 2, 1),
    (1, 2, 37, 41),
    (5, 9),
    (2, 3, 11),
    (2, 518),  # more packet columns than a block has threads
)

KINKS = {
    "relu": (-0.0, 0.0, float("nan")),
    "relu6": (-0.0, 0.0, 6.0, float("nan")),
    "hardswish": (-3.0, 0.0, 3.0),
}
"""Where a slope is a matter of choice: PyTorch's."""

INPUTS = (  # count, source, size, border
    (2, (8, 8), (8, 8), 0),  # additive
    (1, (7, 9), (7, 9), 0),
    (2, (16, 24), (16, 24), 3),  # expansive: 16x24 -> 10x18
    (3, (13, 11), (13, 11), 2),
    (1, (40, 33), (20, 17), 1),  # another size than the input's
    (1, (5, 6), (24, 20), 0),  # enlarged
    (2, (10, 10), (16, 16), 3),  # already of the inner size
    (1, (60, 12), (12, 12), 1),  # shrunk too much for staging
    (1, (3, 5), (4, 2100), 0),  # more pixel groups than a block has threads
)


def tensors(shape: tuple[int, ...], dtype: torch.dtype, seed: int, *, channels_last: bool = False) -> dict[str, Tensor]:
    """x, mask (a third of it zero, some soft), scale, shift, residual and grad_y."""
    g = torch.Generator().manual_seed(seed)
    channels = shape[1]
    mask = torch.rand(channels, generator=g)
    mask = torch.where(mask < 1 / 3, 0.0, torch.where(mask < 2 / 3, 1.0, mask))
    made = {
        "x": (2 * torch.randn(shape, generator=g)).to(dtype),
        "mask": mask,
        "scale": 1 + 0.5 * torch.randn(channels, generator=g),
        "shift": torch.randn(channels, generator=g),
        "residual": torch.randn(shape, generator=g).to(dtype),
        "grad_y": torch.randn(shape, generator=g).to(dtype),
    }
    if channels_last and len(shape) == 4:
        for name in ("x", "residual", "grad_y"):
            made[name] = made[name].contiguous(memory_format=torch.channels_last)
    return made


def difference(a: Tensor, b: Tensor) -> float:
    """max|a-b| / max|b|, at least against 1."""
    if b.numel() == 0:
        return 0.0
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1))
