"""`prompted_input` as a torch operator: fake tensor, autograd, compilation. Off the GPU it runs `reference`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from passdeploy.errors import BadInput
from passdeploy.kernels import dispatch, enqueue, reference
from passdeploy.kernels.arrays import check_sizes
from passdeploy.kernels.dispatch import KINDS
from passdeploy.search.prompt import InputStage


@torch.library.custom_op("passdeploy::prompted_input", mutates_args=())
def _input(
    images: Tensor,
    scale: Tensor,
    shift: Tensor,
    prompt: Tensor | None,
    height: int,
    width: int,
    border: int,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    return reference.prompted_input(images, scale, shift, prompt, (height, width), border, dtype, channels_last)


def input_on(
    loader: enqueue.Loader,
    images: Tensor,
    scale: Tensor,
    shift: Tensor,
    prompt: Tensor | None,
    size: tuple[int, int],
    border: int,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    """The kernel's `prompted_input` through `loader`."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.empty((len(images), 3, *size), dtype=dtype, device=images.device, memory_format=layout)
    alive = [t.contiguous() for t in (images, scale, shift, prompt) if t is not None]
    enqueue.input_stage(
        loader,
        dispatch.stream_of(images.device),
        enqueue.InputArrays(*(t.data_ptr() for t in alive)),
        out.data_ptr(),
        count=len(images),
        source=(images.shape[1], images.shape[2]),
        size=size,
        border=border,
        channels_last=channels_last,
        kind=KINDS[dtype],
    )
    return out


@_input.register_kernel("cuda")
def _input_cuda(
    images: Tensor,
    scale: Tensor,
    shift: Tensor,
    prompt: Tensor | None,
    height: int,
    width: int,
    border: int,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    loader = dispatch.loader(images.device.index)
    if loader is None or dtype not in KINDS or images.numel() == 0 or not dispatch.single(scale, shift, prompt):
        return reference.prompted_input(images, scale, shift, prompt, (height, width), border, dtype, channels_last)
    with torch.cuda.device(images.device):
        return input_on(loader, images, scale, shift, prompt, (height, width), border, dtype, channels_last)


@_input.register_fake
def _input_fake(
    images: Tensor,
    scale: Tensor,
    shift: Tensor,
    prompt: Tensor | None,
    height: int,
    width: int,
    border: int,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty((images.shape[0], 3, height, width), dtype=dtype, device=images.device, memory_format=layout)


def _input_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.has_prompt = inputs[3] is not None


def _input_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    prompt = grad.float().sum(0) if ctx.has_prompt and ctx.needs_input_grad[3] else None
    return (None, None, None, prompt, None, None, None, None, None)


_input.register_autograd(_input_autograd, setup_context=_input_setup)


def prompted_input(
    images: Tensor,
    scale: Tensor,
    shift: Tensor,
    prompt: Tensor | None,
    size: tuple[int, int],
    *,
    border: int = 0,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> Tensor:
    """uint8 images as they were decoded -> a network's input: resized, normalised, prompted, in one pass over memory.

    ``prompt + (inside the border: bilinear(images / 255) * scale + shift)``; align_corners=False, no antialiasing.

    Args:
        images: uint8 (N, h, w, 3), RGB.
        scale: (3,): 1 / std. No gradient.
        shift: (3,): -mean / std. No gradient.
        prompt: (3, H, W) in units of the result, or None. Differentiable.
        size: (H, W).
        border: Pixels of an expansive prompt's border; the image is resized to what it leaves. 0: to all of it.
        dtype: float32, float16 or bfloat16.
        channels_last: Layout of the result.

    Returns:
        (N, 3, H, W).

    Raises:
        BadInput: Shapes or types don't fit.
    """
    if images.dim() != 4 or images.shape[3] != 3 or images.dtype != torch.uint8:
        raise BadInput(f"images: must be uint8 (N, h, w, 3), not {images.dtype} {tuple(images.shape)}")
    check_sizes(tuple(images.shape[1:3]), size, border)
    if prompt is not None and tuple(prompt.shape) != (3, *size):
        raise BadInput(f"prompt: must be (3, {size[0]}, {size[1]}), not {tuple(prompt.shape)}")
    for name, values in (("scale", scale), ("shift", shift)):
        if values.numel() != 3:
            raise BadInput(f"{name}: must have one value per colour, (3,), not {tuple(values.shape)}")
    if scale.requires_grad or shift.requires_grad:
        raise BadInput("scale and shift of the input have no gradient here; detach them")
    for name, tensor in (("scale", scale), ("shift", shift), ("prompt", prompt)):
        if tensor is not None and tensor.device != images.device:
            raise BadInput(f"{name}: lies on {tensor.device}, the images on {images.device}; move it there")
    prompt = None if prompt is None else prompt.float()
    scale, shift = scale.reshape(3).float(), shift.reshape(3).float()
    result: Tensor = _input(images, scale, shift, prompt, size[0], size[1], border, dtype, channels_last)
    return result


def stage_input(
    stage: InputStage, images: Tensor, *, dtype: torch.dtype = torch.float32, channels_last: bool = False
) -> Tensor:
    """What `stage` makes of ``images / 255``, from uint8 images (N, h, w, 3) and in one pass; see `prompted_input`."""
    border = stage.width if stage.kind == "expansive" else 0
    if stage.kind != "expansive" and tuple(images.shape[1:3]) != tuple(stage.size):
        raise BadInput(f"images: must be {stage.size[0]}x{stage.size[1]} pixels, not {tuple(images.shape[1:3])}")
    return prompted_input(
        images, stage.scale, stage.shift, stage.pixels(), stage.size, border=border, dtype=dtype,
        channels_last=channels_last,
    )  # fmt: skip
