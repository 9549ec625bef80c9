"""The kernels on any array of a GPU that speaks the CUDA array interface (cupy, pycuda, numba, torch): no torch needed.

An inference server that has decoded images on its GPU feeds a shipped engine with `prompted_input_into`. Arrays that
speak DLPack only: `torch.from_dlpack`, and the torch operators.
"""

from __future__ import annotations

from typing import Any

from passdeploy.errors import BadInput
from passdeploy.kernels import enqueue
from passdeploy.kernels.enqueue import Loader
from passdeploy.kernels.interface import LEGACY_STREAM, View, view


def prompted_input_into(
    out: Any,
    images: Any,
    scale: Any,
    shift: Any,
    prompt: Any = None,
    *,
    border: int = 0,
    channels_last: bool = False,
    bfloat16: bool = False,
    stream: int = 0,
    loader: Loader | None = None,
) -> None:
    """Writes a network's input from uint8 images: normalised, prompted, in the engine's type and layout, in one pass.

    Comes after what has been enqueued on the streams on which the arrays, `out` too, say that they are in use; arrays
    that say nothing (torch's) are taken to be in use on the default stream.

    Args:
        out: (N, 3, H, W), or (N, H, W, 3) with `channels_last`.
        images: uint8 (N, h, w, 3).
        scale: float32 (3,): 1 / std.
        shift: float32 (3,): -mean / std.
        prompt: float32 (3, H, W); None: no prompt.
        border: Of an expansive prompt; the image is resized to what it leaves.
        channels_last: Layout of `out`.
        bfloat16: `out` is bfloat16 in an array of 16-bit unsigned integers.
        stream: Of the engine, as a number.
        loader: `driver.CudaBindings` (default) or `driver.Pycuda`.

    Raises:
        BadInput: Shapes or types don't fit.
        Unavailable: No GPU, or no driver bindings.
    """
    to, source = view(out, "out", bfloat16=bfloat16), view(images, "images")
    if len(to.shape) != 4 or to.shape[3 if channels_last else 1] != 3 or to.kind == "u8":
        layout = "(N, H, W, 3)" if channels_last else "(N, 3, H, W)"
        raise BadInput(f"out: must be a float array {layout}, not {to.kind} {to.shape}")
    size = to.shape[1:3] if channels_last else to.shape[2:4]
    expected = {
        "images": (source, (to.shape[0], *source.shape[1:3], 3), "u8"),
        "scale": (view(scale, "scale"), (3,), "f32"),
        "shift": (view(shift, "shift"), (3,), "f32"),
    }
    if prompt is not None:
        expected["prompt"] = (view(prompt, "prompt"), (3, *size), "f32")
    for name, (array, shape, kind) in expected.items():
        if array.shape != shape or array.kind != kind:
            raise BadInput(f"{name}: must be {kind} {shape}, not {array.kind} {array.shape}")
    check_sizes(source.shape[1:3], size, border)
    if to.shape[0] == 0:  # such arrays have no address that a device could be told by
        return
    if loader is None:
        from passdeploy.kernels.driver import default_loader, device_of

        # The arrays' own, whatever the thread's current device is.
        device = device_of(to.address)
        for name, (array, _, _) in expected.items():
            if (other := device_of(array.address)) != device:
                raise BadInput(f"{name}: lies on GPU {other}, out on GPU {device}; move it there")
        loader = default_loader(device)
    for other in sorted(_others([to, *(array for array, _, _ in expected.values())], stream)):
        loader.wait(stream, other)
    addresses = [array.address for array, _, _ in expected.values()]  # in the order of InputArrays
    enqueue.input_stage(
        loader,
        stream,
        enqueue.InputArrays(*addresses),
        to.address,
        count=to.shape[0],
        source=(source.shape[1], source.shape[2]),
        size=(size[0], size[1]),
        border=border,
        channels_last=channels_last,
        kind=to.kind,
    )


def _others(arrays: list[View], stream: int) -> set[int]:
    """Streams to wait for; 0 and 1 are the same one."""
    named = {array.stream for array in arrays if array.stream is not None}
    return {other for other in named if (other or LEGACY_STREAM) != (stream or LEGACY_STREAM)}


def check_sizes(source: tuple[int, ...], size: tuple[int, ...], border: int) -> None:
    """Raises `BadInput` when the images are empty or the border leaves nothing of them."""
    if min(source) < 1 or min(size) < 1:
        raise BadInput(f"images of {source[0]}x{source[1]} for an input of {size[0]}x{size[1]}: a side is empty")
    if border < 0 or 2 * border >= min(size):
        raise BadInput(f"border {border}: leaves nothing of an input of {size[0]}x{size[1]}")
