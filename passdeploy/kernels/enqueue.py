"""Fills in a launch's addresses and hands it to a loader. Addresses are plain numbers: no torch, no CUDA here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from passdeploy.kernels.geometry import ActivationShape, Launch, prompted_input


class Loader(Protocol):
    """What can run a kernel: the driver through cuda-bindings or pycuda, or the tests' emulation."""

    def launch(self, launch: Launch, stream: int) -> None:
        """Enqueues the launch on a stream (a ``CUstream`` as a number; 0 is the default stream)."""
        ...

    def wait(self, stream: int, other: int) -> None:
        """What is enqueued on a stream from now on waits for what has been enqueued on the other one by now."""
        ...


@dataclass(frozen=True)
class ActivationArrays:
    """Addresses of the inputs of `masked_affine_act`; 0 where there is none.

    Attributes:
        x: Of the kind of the shape, in its layout.
        mask: float32 (channels,).
        scale: float32 (channels,).
        shift: float32 (channels,).
        residual: Like x; 0: none.
    """

    x: int
    mask: int
    scale: int
    shift: int
    residual: int = 0

    def fill(self, launch: Launch) -> None:
        for name in ("x", "mask", "scale", "shift", "residual"):
            setattr(launch.params, name, getattr(self, name))


def forward(
    loader: Loader, stream: int, shape: ActivationShape, activation: str, arrays: ActivationArrays, y: int
) -> None:
    """Writes ``activation(x * (mask * scale) + shift + residual)`` to address `y`."""
    launch = shape.forward(activation)
    arrays.fill(launch)
    launch.params.y = y
    loader.launch(launch, stream)


@dataclass(frozen=True)
class Gradients:
    """Addresses of what the backward writes; 0 where a gradient is not wanted.

    Attributes:
        x: Like the forward's x.
        residual: Likewise.
        mask: float32 (channels,); also of channels whose mask is zero.
        scale: float32 (channels,).
        shift: float32 (channels,).
        partial: float32 scratch of the size that `partial_size` says; 0 when mask, scale and shift are not wanted.
    """

    x: int = 0
    residual: int = 0
    mask: int = 0
    scale: int = 0
    shift: int = 0
    partial: int = 0


def partial_size(shape: ActivationShape) -> int:
    """Number of float32 values of the backward's scratch array."""
    return shape.backward("none")[2]


def backward(
    loader: Loader,
    stream: int,
    shape: ActivationShape,
    activation: str,
    arrays: ActivationArrays,
    grad_y: int,
    out: Gradients,
) -> None:
    """Writes the gradients of `forward`; the sums over pixels and images are taken in a fixed order."""
    first, second, _ = shape.backward(activation)
    arrays.fill(first)
    params = first.params
    params.grad_y, params.grad_x, params.grad_residual, params.partial = grad_y, out.x, out.residual, out.partial
    params.grad_mask, params.grad_scale, params.grad_shift = out.mask, out.scale, out.shift
    loader.launch(first, stream)
    if out.partial:
        loader.launch(second, stream)  # shares the parameters of the first


@dataclass(frozen=True)
class InputArrays:
    """Addresses of the inputs of `prompted_input`; prompt 0: none.

    Attributes:
        images: uint8 (count, source height, source width, 3).
        scale: float32 (3,): 1 / std.
        shift: float32 (3,): -mean / std.
        prompt: float32 (3, height, width).
    """

    images: int
    scale: int
    shift: int
    prompt: int = 0


def input_stage(
    loader: Loader,
    stream: int,
    arrays: InputArrays,
    out: int,
    *,
    count: int,
    source: tuple[int, int],
    size: tuple[int, int],
    border: int,
    channels_last: bool,
    kind: str,
) -> None:
    """Writes the network's input to address `out`; see `geometry.prompted_input` for the sizes."""
    launch = prompted_input(count, source, size, border=border, channels_last=channels_last, kind=kind)
    for name in ("images", "scale", "shift", "prompt"):
        setattr(launch.params, name, getattr(arrays, name))
    launch.params.out = out
    loader.launch(launch, stream)
