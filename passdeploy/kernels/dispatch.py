"""What the torch operators share: which kernels there are for a type, what launches them, on which stream."""

from __future__ import annotations

import warnings
from functools import cache

import torch
from torch import Tensor

from passdeploy.errors import PassdeployError
from passdeploy.kernels.enqueue import Loader

KINDS = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
"""Suffixes of the kernels' names."""


@cache
def loader(device: int) -> Loader | None:
    """What launches on a GPU; None, with one warning, when there is a GPU that can't be reached."""
    from passdeploy.kernels.driver import CudaBindings, unavailable

    reason = unavailable()
    if reason is None:
        try:
            found = CudaBindings(device)
            found.prepare()
        except PassdeployError as error:  # no compiler for it, or an image that the driver refuses
            reason = str(error)
        else:
            return found
    warnings.warn(f"passdeploy's CUDA kernels are replaced by PyTorch's: {reason}", stacklevel=2)
    return None


def single(*tensors: Tensor | None) -> bool:
    """Whether these are float32, as what the kernels read them as.

    The functions see to it, but a program that was exported calls the operators themselves, and may have been cast.
    """
    return all(tensor is None or tensor.dtype == torch.float32 for tensor in tensors)


def stream_of(device: torch.device) -> int:
    """PyTorch's current stream on a device, as a number."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
