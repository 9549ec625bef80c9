"""The CUDA array interface: arrays of a GPU as cupy, pycuda, numba and torch hand them to each other.

Described at https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html. Standard library only: the runner
depends on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from passdeploy.errors import BadInput

_KINDS = {"<f4": "f32", "<f2": "f16"}
LEGACY_STREAM = 1
"""The default stream, as the interface numbers it."""


@dataclass(frozen=True)
class View:
    """What the CUDA array interface says of an array that is dense in the order of its indices."""

    address: int
    shape: tuple[int, ...]
    kind: str
    stream: int | None = None
    """Where the array may still be being written; None: its owner says nowhere."""


def view(array: Any, name: str, *, bfloat16: bool = False) -> View:
    """Reads ``array.__cuda_array_interface__``.

    Args:
        array: Any object with the attribute.
        name: For the error message.
        bfloat16: Read 16-bit unsigned integers as bfloat16, for which the interface has no name.

    Raises:
        BadInput: No such attribute, or not a dense array of a known type.
    """
    interface = getattr(array, "__cuda_array_interface__", None)
    if interface is None:
        raise BadInput(f"{name}: {type(array).__name__} does not offer the CUDA array interface; is it on the GPU?")
    kind = {"|u1": "u8", **_KINDS, **({"<u2": "bf16"} if bfloat16 else {})}.get(interface["typestr"])
    if kind is None:
        raise BadInput(f"{name}: arrays of type {interface['typestr']} are not supported")
    shape, strides = tuple(interface["shape"]), interface.get("strides")
    size = int(interface["typestr"][2:])
    dense: list[int] = []
    for extent in reversed(shape):
        dense.insert(0, size)
        size *= extent
    if strides is not None and any(s != d for s, d, n in zip(strides, dense, shape, strict=True) if n > 1):
        raise BadInput(f"{name}: has gaps or another order of its dimensions; make it contiguous")
    # Before version 3 (torch's arrays are of version 2) nothing is said of streams: the default stream, then. What is
    # written on another one that does not wait for it, its owner has to wait for.
    silent = LEGACY_STREAM if interface.get("version", 0) < 3 else None
    return View(int(interface["data"][0]), shape, kind, interface.get("stream", silent))
