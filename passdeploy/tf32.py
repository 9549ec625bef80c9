"""Single precision that is single precision, on GPUs too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def single_means_single() -> Iterator[None]:
    """No TF32, which PyTorch allows convolutions by default: a float32 product would have 10 bits of mantissa.

    Compiled kernels take it from the compiler's process, calls of cuDNN from the one that runs them.
    """
    import torch

    backends: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed
