"""`masked_affine_act` as a torch operator: fake tensor, autograd, compilation. Off the GPU it runs `reference`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from passdeploy.errors import BadInput, nearest
from passdeploy.kernels import dispatch, enqueue, reference
from passdeploy.kernels.dispatch import KINDS
from passdeploy.kernels.geometry import ACTIVATIONS, ActivationShape


def shape_of(x: Tensor) -> ActivationShape | None:
    """How the kernels see x (N, C, ...); None for what they can't take (another type, or too large)."""
    if x.dtype not in KINDS or x.numel() == 0:
        return None
    images, channels = x.shape[0], x.shape[1]
    plane = x.numel() // (images * channels)
    last = plane == 1 or reference.memory_format(x) == torch.channels_last
    shape = (
        ActivationShape(images * plane, channels, 1, True, KINDS[x.dtype])
        if last
        else ActivationShape(images, channels, plane, False, KINDS[x.dtype])
    )
    return shape if shape.fits else None


@torch.library.custom_op("passdeploy::masked_affine_act", mutates_args=())
def _forward(x: Tensor, mask: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    return reference.forward(x, mask, scale, shift, residual, activation)


def _reference_backward(
    grad_y: Tensor,
    x: Tensor,
    mask: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    activation: str,
    want_x: bool,
    want_channels: bool,
    want_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grads = reference.backward(grad_y, x, mask, scale, shift, residual, activation)
    wanted = (want_x, want_channels, want_channels, want_channels, want_residual)
    return tuple(g if want else g.new_empty(0) for g, want in zip(grads, wanted, strict=True))  # type: ignore[return-value]


_backward = torch.library.custom_op("passdeploy::masked_affine_act_backward", _reference_backward, mutates_args=())


def forward_on(
    loader: enqueue.Loader,
    shape: ActivationShape,
    x: Tensor,
    mask: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    """The kernel's forward through `loader`; `shape` is that of `shape_of(x)`."""
    layout = reference.memory_format(x)
    x = x.contiguous(memory_format=layout)
    residual = None if residual is None else residual.contiguous(memory_format=layout)
    y = torch.empty_like(x, memory_format=layout)
    arrays, _alive = _arrays(x, mask, scale, shift, residual)
    enqueue.forward(loader, dispatch.stream_of(x.device), shape, activation, arrays, y.data_ptr())
    return y


def backward_on(
    loader: enqueue.Loader,
    shape: ActivationShape,
    grad_y: Tensor,
    x: Tensor,
    mask: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    activation: str,
    want_x: bool,
    want_channels: bool,
    want_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The kernel's backward through `loader`; a gradient that is not wanted comes back empty."""
    layout = reference.memory_format(x)
    x = x.contiguous(memory_format=layout)
    residual = None if residual is None else residual.contiguous(memory_format=layout)
    grad_y = grad_y.contiguous(memory_format=layout)

    def result(like: Tensor, wanted: bool) -> Tensor:
        return torch.empty_like(like, memory_format=layout) if wanted else like.new_empty(0)

    grad_x, grad_residual = result(x, want_x), result(x, want_residual)
    channels = mask.shape[0] if want_channels else 0
    grad_mask, grad_scale, grad_shift = (mask.new_empty(channels) for _ in range(3))
    partial = mask.new_empty(enqueue.partial_size(shape) if want_channels else 0)
    arrays, _alive = _arrays(x, mask, scale, shift, residual)
    # An empty tensor's address is 0: not wanted.
    out = enqueue.Gradients(
        *(t.data_ptr() for t in (grad_x, grad_residual, grad_mask, grad_scale, grad_shift, partial))
    )
    enqueue.backward(loader, dispatch.stream_of(x.device), shape, activation, arrays, grad_y.data_ptr(), out)
    return grad_x, grad_mask, grad_scale, grad_shift, grad_residual


def mask_gradient(
    grad_y: Tensor,
    x: Tensor,
    ones: Tensor,
    zeros: Tensor,
    activation: str,
    forward: Callable[..., Tensor],
    backward: Callable[..., Sequence[Tensor]],
) -> Tensor:
    """Sums of ``grad_y * activation(x)``: the gradient of ``activation(x) * mask`` in masks, as if none were zero.

    The kernel's own gradient is that of a mask before the activation: ``x * slope(x)`` in place of the activation,
    which is the same for none and relu only.

    Args:
        grad_y: Like x.
        x: (N, C, ...).
        ones: (C,).
        zeros: (C,).
        activation: One of `ACTIVATIONS`.
        forward: Called as `reference.forward` is.
        backward: Called as `reference.backward` is.
    """
    if activation not in ("none", "relu"):
        x, activation = forward(x, ones, ones, zeros, None, activation), "none"
    return backward(grad_y, x, ones, ones, zeros, None, activation)[1]


def _arrays(
    x: Tensor, mask: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None
) -> tuple[enqueue.ActivationArrays, list[Tensor]]:
    """Addresses, and the tensors that must outlive the launch's enqueueing."""
    alive = [x, mask.contiguous(), scale.contiguous(), shift.contiguous()]
    if residual is not None:
        alive.append(residual)
    return enqueue.ActivationArrays(*(t.data_ptr() for t in alive)), alive


@_forward.register_kernel("cuda")
def _forward_cuda(
    x: Tensor, mask: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, activation: str
) -> Tensor:
    shape, loader = shape_of(x), dispatch.loader(x.device.index)
    if shape is None or loader is None or not dispatch.single(mask, scale, shift):
        return reference.forward(x, mask, scale, shift, residual, activation)
    with torch.cuda.device(x.device):
        return forward_on(loader, shape, x, mask, scale, shift, residual, activation)


@_backward.register_kernel("cuda")
def _backward_cuda(
    grad_y: Tensor,
    x: Tensor,
    mask: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    activation: str,
    want_x: bool,
    want_channels: bool,
    want_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    shape, loader = shape_of(x), dispatch.loader(x.device.index)
    wants = (want_x, want_channels, want_residual)
    if shape is None or loader is None or not dispatch.single(mask, scale, shift):
        return _reference_backward(grad_y, x, mask, scale, shift, residual, activation, *wants)
    with torch.cuda.device(x.device):
        return backward_on(loader, shape, grad_y, x, mask, scale, shift, residual, activation, *wants)


@_forward.register_fake
def _forward_fake(
    x: Tensor, mask: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, activation: str
) -> Tensor:
    return torch.empty_like(x, memory_format=reference.memory_format(x))


@_backward.register_fake
def _backward_fake(
    grad_y: Tensor,
    x: Tensor,
    mask: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    activation: str,
    want_x: bool,
    want_channels: bool,
    want_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    layout = reference.memory_format(x)

    def like(t: Tensor, wanted: bool) -> Tensor:
        return torch.empty_like(t, memory_format=layout) if wanted else t.new_empty(0)

    def channels(t: Tensor) -> Tensor:
        return t.new_empty(t.shape[0] if want_channels else 0)

    return like(x, want_x), channels(mask), channels(scale), channels(shift), like(x, want_residual)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, mask, scale, shift, residual, activation = inputs
    ctx.save_for_backward(x, mask, scale, shift, residual)
    ctx.activation = activation


def _autograd(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    x, mask, scale, shift, residual = ctx.saved_tensors
    need_x, *need_channels, need_residual, _ = ctx.needs_input_grad
    grads = _backward(
        grad_y, x, mask, scale, shift, residual, ctx.activation, need_x, any(need_channels), need_residual
    )
    needs = (need_x, *need_channels, need_residual)
    return (*(g if need else None for g, need in zip(grads, needs, strict=True)), None)


_forward.register_autograd(_autograd, setup_context=_setup)


def masked_affine_act(
    x: Tensor,
    mask: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """``activation(x * (mask * scale) + shift + residual)`` per channel, in one pass over memory.

    Where the mask is zero x counts as absent (on a GPU in NCHW it is not even read). The gradient of the mask is that
    of every channel, the masked ones too, so a straight-through estimator can bring one back. To let a masked channel
    be exactly ``activation(residual)``, give ``mask * shift`` as the shift. A mask per *unit* of several channels is
    ``unit_mask[unit_of_channel]``; autograd sums its gradient.

    Args:
        x: (N, C) or (N, C, ...); float32, float16, bfloat16 (others, as float64, by the reference). Contiguous or
            channels_last; the result has the same layout.
        mask: (C,), any real type, bool included.
        scale: (C,).
        shift: (C,).
        residual: Like x.
        activation: One of `ACTIVATIONS`.

    Returns:
        Like x. Differentiable once in all tensors; gradients are summed in a fixed order.

    Raises:
        BadInput: Shapes don't fit, or no such activation.
    """
    if activation not in ACTIVATIONS:
        raise BadInput(f"activation {activation!r}: no such activation{nearest(activation, ACTIVATIONS)}")
    if x.dim() < 2 or not x.is_floating_point():
        raise BadInput(f"x: must be a float tensor (N, C, ...), not {x.dtype} {tuple(x.shape)}")
    for name, values in (("mask", mask), ("scale", scale), ("shift", shift)):
        if values.shape != x.shape[1:2]:
            raise BadInput(f"{name}: must have one value per channel, ({x.shape[1]},), not {tuple(values.shape)}")
        if values.device != x.device:  # a kernel would take the host's address for one of the GPU's
            raise BadInput(f"{name}: lies on {values.device}, x on {x.device}; move it there")
    if residual is not None and (residual.shape, residual.dtype, residual.device) != (x.shape, x.dtype, x.device):
        raise BadInput(f"residual: must be like x, {x.dtype} {tuple(x.shape)} on {x.device}")
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    result: Tensor = _forward(x, mask.to(wide), scale.to(wide), shift.to(wide), residual, activation)
    return result


def batch_norm_affine(norm: nn.modules.batchnorm._BatchNorm) -> tuple[Tensor, Tensor]:
    """A batch norm with fixed statistics as (scale, shift), each (C,) float32; differentiable in its weight and bias.

    Raises:
        BadInput: It keeps no running statistics.
    """
    if norm.running_mean is None or norm.running_var is None:
        raise BadInput("batch norm without running statistics can't be written as scale and shift")
    inverse = torch.rsqrt(norm.running_var + norm.eps)
    scale = inverse if norm.weight is None else norm.weight * inverse
    shift = -norm.running_mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias
