"""Where and how a network lies in memory while it is trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn

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


def takes(model: nn.Module, images: Tensor) -> bool:
    """Whether a model computes on images that lie channels last: what calls `view` on a feature map does not."""
    training = {module: module.training for module in model.modules()}
    model.eval()  # one image is no batch for a batch norm, and leaves no trace in its statistics
    try:
        with torch.no_grad():
            model(images[:1].contiguous(memory_format=torch.channels_last))
    except RuntimeError as error:
        return "view size is not compatible" not in str(error)
    finally:
        model.train(training[model])  # by the modules' own `train`: some forget there what they worked out from weights
        for module, was in training.items():
            module.training = was
    return True


def laid_out(model: nn.Module, images: Tensor) -> torch.memory_format:
    """How images should lie for a model that is placed already."""
    return torch.channels_last if takes(model, images) else torch.contiguous_format


def place(model: nn.Module, device: torch.device, input_shape: tuple[int, ...]) -> torch.memory_format:
    """Moves a model to a device, in place.

    Only what has four dimensions can lie channels last: PyTorch refuses a model with tensors of five, such as position
    tables.

    Args:
        model: Its input stage included.
        device: Where to.
        input_shape: (C, H, W) of one image.

    Returns:
        How its images should lie.
    """
    model.to(device)
    how = layout(model, device)
    _lay(model, how)
    if how is torch.channels_last and not takes(model, torch.zeros(1, *input_shape, device=device)):
        how = torch.contiguous_format
        _lay(model, how)
    return how


def _lay(model: nn.Module, how: torch.memory_format) -> None:
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dim() == 4 and how is torch.contiguous_format:
            # Copied: of a 1x1 kernel `contiguous` leaves the strides that make the convolution run channels last.
            tensor.data = tensor.data.clone(memory_format=how)
        elif tensor.dim() == 4:
            tensor.data = tensor.data.contiguous(memory_format=how)
