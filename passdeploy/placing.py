"""Where and how a network lies in memory while it is trained."""

from __future__ import annotations

import torch
from torch import nn

BLOCK = 16
"""Channels that the widest of oneDNN's kernels computes at a time."""


def layout(model: nn.Module, device: torch.device) -> torch.memory_format:
    """How images and convolutions should lie: channels last, which is faster, where that is safe.

    On CPUs, oneDNN's gradient of a strided 1x1 convolution with fewer input channels than a block, channels last,
    writes behind the end of its memory (https://github.com/uxlfoundation/oneDNN/issues/6035; seen with AVX2, oneDNN
    3.12): heap corruption, in thin networks with narrow downsampling layers.
    """
    unsafe = device.type == "cpu" and any(
        isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) and max(m.stride) > 1 and m.in_channels // m.groups < BLOCK
        for m in model.modules()
    )
    return torch.contiguous_format if unsafe else torch.channels_last


def place(model: nn.Module, device: torch.device) -> torch.memory_format:
    """Moves a model to a device, in place.

    Only what has four dimensions can lie channels last: PyTorch refuses a model with tensors of five, such as position
    tables.

    Returns:
        How its images should lie.
    """
    model.to(device)
    how = layout(model, device)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dim() == 4:
            tensor.data = tensor.data.contiguous(memory_format=how)
    return how
