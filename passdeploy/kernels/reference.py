"""What the kernels compute, in PyTorch: what they are tested against, and the operators on every other device."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def _wide(x: Tensor) -> torch.dtype:
    """Sums are in float32, as in the kernels; float64 stays, for gradcheck."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.to(_wide(x)).view(1, -1, *[1] * (x.dim() - 2))


def memory_format(x: Tensor) -> torch.memory_format:
    """The layout in which a result of `masked_affine_act` comes: that of x."""
    if x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def _like(value: Tensor, x: Tensor) -> Tensor:
    """A new tensor of x's type and layout that holds `value`."""
    return torch.empty_like(x, memory_format=memory_format(x)).copy_(value)


def _activate(z: Tensor, activation: str) -> Tensor:
    match activation:
        case "none":
            return z
        case "relu":
            return F.relu(z)
        case "relu6":
            return F.relu6(z)
        case "silu":
            return F.silu(z)
        case "gelu":
            return F.gelu(z)
        case "hardswish":
            return F.hardswish(z)
    raise AssertionError(activation)


def _slope(z: Tensor, activation: str) -> Tensor:
    """The activation's derivative, with PyTorch's choice at the kinks, and relu's and relu6's of 1 at a NaN."""
    one, zero = torch.ones_like(z), torch.zeros_like(z)
    match activation:
        case "none":
            return one
        case "relu":
            return torch.where(z <= 0, zero, one)
        case "relu6":
            return torch.where((z <= 0) | (z >= 6), zero, one)
        case "silu":
            s = torch.sigmoid(z)
            return s * (1 + z * (1 - s))
        case "gelu":
            cdf = 0.5 + 0.5 * torch.erf(z / math.sqrt(2))
            return cdf + z * torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
        case "hardswish":
            return torch.where(z <= -3, zero, torch.where(z >= 3, one, z / 3 + 0.5))
    raise AssertionError(activation)


def _before_activation(x: Tensor, mask: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None) -> Tensor:
    wide = _wide(x)
    m = _per_channel(mask, x)
    kept = torch.where(m != 0, x.to(wide), torch.zeros((), dtype=wide, device=x.device))
    z = kept * (m * _per_channel(scale, x)) + _per_channel(shift, x)
    return z if residual is None else z + residual.to(wide)


def forward(x: Tensor, mask: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    """``activation(x * (mask * scale) + shift + residual)``; x counts as absent where its channel's mask is zero.

    Args:
        x: (N, C, ...).
        mask: (C,).
        scale: (C,).
        shift: (C,).
        residual: Like x.
        activation: One of `geometry.ACTIVATIONS`.
    """
    return _like(_activate(_before_activation(x, mask, scale, shift, residual), activation), x)


def backward(
    grad_y: Tensor,
    x: Tensor,
    mask: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, mask, scale, shift and residual (also when there is none: then it is that of ``+ 0``).

    The gradient of a mask of zero is what keeping that channel would have changed, to first order: straight-through
    estimators need it.
    """
    wide = _wide(x)
    z = _before_activation(x, mask, scale, shift, residual)
    grad = grad_y.to(wide) * _slope(z, activation)
    others = [d for d in range(x.dim()) if d != 1]
    sum_gx, sum_g = (grad * x.to(wide)).sum(others), grad.sum(others)
    m, channel_mask = _per_channel(mask, x), mask.to(wide)
    grad_x = torch.where(m != 0, grad * (m * _per_channel(scale, x)), torch.zeros_like(grad))
    return (
        _like(grad_x, x),
        (sum_gx * scale.to(wide)).to(mask.dtype),
        torch.where(channel_mask != 0, sum_gx * channel_mask, torch.zeros_like(sum_gx)).to(scale.dtype),
        sum_g.to(shift.dtype),
        _like(grad, x),
    )


def prompted_input(
    images: Tensor,
    scale: Tensor,
    shift: Tensor,
    prompt: Tensor | None,
    size: tuple[int, int],
    border: int,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    """uint8 (N, h, w, 3) -> (N, 3, H, W): what `passdeploy.search.prompt.InputStage` does with ``images / 255``.

    Args:
        images: RGB.
        scale: (3,), 1 / std.
        shift: (3,), -mean / std.
        prompt: (3, H, W), added last; None: nothing.
        size: (H, W).
        border: Pixels on each side that show the prompt only.
        dtype: Of the result.
        channels_last: Its layout.
    """
    inner = (size[0] - 2 * border, size[1] - 2 * border)
    values = images.permute(0, 3, 1, 2).float() / 255
    if inner != tuple(values.shape[2:]):
        values = F.interpolate(values, inner, mode="bilinear", align_corners=False, antialias=False)
    values = values * scale.view(1, 3, 1, 1) + shift.view(1, 3, 1, 1)
    values = F.pad(values, (border,) * 4)
    if prompt is not None:
        values = values + prompt
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(values.shape, dtype=dtype, device=images.device, memory_format=layout).copy_(values)
