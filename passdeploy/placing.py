"""Where and how a network lies in memory while it is trained."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

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


def ease_norms(model: nn.Module) -> list[RemovableHandle]:
    """Has training's batch norms of odd widths compute on images that lie channel by channel, until hooks are removed.

    On images that lie channels last, PyTorch's batch norm takes channels that fill no vector one by one: on an Intel
    Xeon with AVX-512, its backward pass takes 8.5 ms for 128 images of 8 x 28 x 28 in bfloat16, and 0.4 ms where they
    lie channel by channel (2.13.0; 24 channels: 8.8 and 0.9; 16: 1.3 and 0.7, which turning them would cost again).
    Thin networks are full of such widths. Values are the same up to rounding.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX512":  # others were not measured
        return []
    handles = []
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.num_features % BLOCK:
            turn = _Turn()
            handles += [module.register_forward_pre_hook(turn.before), module.register_forward_hook(turn.after)]
    return handles


@contextlib.contextmanager
def eased(model: nn.Module) -> Iterator[None]:
    """`ease_norms` until the block is left, by an error too: what is copied and exported later has no hooks."""
    handles = ease_norms(model)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Turn:
    """Turns a module's images on the way in, and back on the way out."""

    def __init__(self) -> None:
        self.turned = False

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """A forward pre-hook."""
        self.turned = bool(args) and module.training and _gains(args[0])
        return (args[0].contiguous(), *args[1:]) if self.turned else None

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """A forward hook."""
        return output.contiguous(memory_format=torch.channels_last) if self.turned else None


def _gains(images: Tensor) -> bool:
    """Whether turning costs less than it saves: in float32, where there are few channels."""
    last = images.device.type == "cpu" and not images.is_contiguous()
    return (
        last
        and images.is_contiguous(memory_format=torch.channels_last)
        and (images.dtype is torch.bfloat16 or images.shape[1] < BLOCK)
    )


def takes(model: nn.Module, images: Tensor) -> bool:
    """Whether a model computes on images that lie channels last: what calls `view` on a feature map does not."""
    training = {module: module.training for module in model.modules()}
    model.eval()  # leaves no trace in batch norms' statistics
    # Twice the same image: of a single one, a view that joins images and channels works however it lies.
    pair = images[:1].expand(2, *images.shape[1:])
    try:
        with torch.no_grad():
            model(pair.contiguous(memory_format=torch.channels_last))
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
