"""Whether the masked kernel may be used on this GPU: asked of the kernel itself, on the shapes that a search runs.

The first call on a new shape compares forward, gradients and repeatability with the reference; the answer is kept. One
wrong answer and the GPU is done with: the search goes on without the kernel, and one line says why. What this can't
catch is a kernel that takes the CUDA context down; the tests under compute-sanitizer are there for that.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from passdeploy.kernels import dispatch, driver, masked_op, reference
from passdeploy.kernels.enqueue import Loader

BOUNDS = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Largest difference from the reference, relative to the largest value: four roundings of a half type."""
SUM_BOUND = 1e-4
"""The same for the mask's gradient, a float32 sum in another order than the reference's: where what is summed are the
values that were given, not rounded ones."""
_CHUNK = 2**24
"""Elements of which the reference makes its float32 copies at a time."""

_log = logging.getLogger(__name__)
Key = tuple[torch.device, tuple[int, ...], torch.dtype, torch.memory_format, str]
Check = Callable[[Tensor, str], str | None]
_passed: set[Key] = set()
_refused: dict[torch.device, str] = {}


def refused(device: torch.device) -> str | None:
    """Why the kernel is not used on a device; None: nothing is known against it."""
    return _refused.get(device)


def reset() -> None:
    """Forgets all answers."""
    _passed.clear()
    _refused.clear()


def trusted(x: Tensor, activation: str, check: Check | None = None) -> bool:
    """Whether the kernel may compute ``activation(x) * mask`` and its gradients; one logged line says so if not.

    Args:
        x: (N, C) or (N, C, ...), as the search has it; its values are not looked at.
        activation: One of `geometry.ACTIVATIONS`.
        check: Returns what is wrong; default: `complaint` on a GPU, nothing elsewhere, where the reference runs.
    """
    device = x.device
    if device in _refused:
        return False
    key = (device, tuple(x.shape), x.dtype, reference.memory_format(x), activation)
    if key in _passed:
        return True
    if check is None:
        check = complaint if device.type == "cuda" else _nothing
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        reason = check(x, activation)
    if reason is None:
        _passed.add(key)
        return True
    refuse(device, reason)
    return False


def refuse(device: torch.device, reason: str) -> None:
    """Does without the kernel on a device from now on; the first reason is told, once."""
    if device not in _refused:
        _refused[device] = reason
        _log.warning("passdeploy: the search does without its CUDA kernel: %s", reason)


def complaint(x: Tensor, activation: str, run: _Run | None = None) -> str | None:
    """Runs the kernel on random values of x's shape, type and layout; None when it does what the reference does.

    The random generator of the search is not touched.
    """
    shape = masked_op.shape_of(x)
    if shape is None:  # another type, or too large: the operator takes the reference by itself
        return None
    where = f"{activation} on {tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}"
    try:
        if run is None:
            if reason := driver.unavailable():
                return reason
            loader = dispatch.loader(x.device.index or 0)
            if loader is None:  # and why has been said
                return "its code can't be loaded here"
            run = _Run(loader)
        return _compare(x, activation, run, where)
    except torch.OutOfMemoryError as error:
        if len(x) == 1:
            return f"{where}: {str(error).splitlines()[0][:200]}"
    except Exception as error:  # no code for this GPU, a launch refused, no memory: whatever it is, the search goes on
        said = str(error).strip().splitlines()
        return f"{where}: {said[0][:200] if said else type(error).__name__}"
    # A check takes six times what it checks: fewer images will do. Only out here, where the error is gone: it holds the
    # frames that it went through, and they hold what did fit.
    torch.cuda.empty_cache()
    return complaint(x[: -(-len(x) // 4)], activation, run)


class _Run:
    """The kernel on a loader, whatever device the tensors say they are on."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __call__(self, x: Tensor, grad_y: Tensor, mask: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
        """y, the gradient of x, and that of the mask (as if nothing were masked)."""
        shape = masked_op.shape_of(x)
        assert shape is not None
        ones, zeros = torch.ones_like(mask), torch.zeros_like(mask)
        rest = (ones, zeros, None, activation)

        def forward(*given: Any) -> Tensor:
            return masked_op.forward_on(self.loader, shape, *given)

        def backward(*given: Any) -> tuple[Tensor, ...]:
            wanted: tuple[Any, ...] = (*given, False, True, False)
            return masked_op.backward_on(self.loader, shape, *wanted)

        y = forward(x, mask, *rest)
        grad_x = masked_op.backward_on(self.loader, shape, grad_y, x, mask, *rest, True, False, False)[0]
        grad_mask = masked_op.mask_gradient(grad_y, x, ones, zeros, activation, forward, backward)
        return y, grad_x, grad_mask


def _compare(x: Tensor, activation: str, run: _Run, where: str) -> str | None:
    generator = torch.Generator(x.device).manual_seed(0)
    layout = reference.memory_format(x)
    x = torch.empty_like(x, memory_format=layout).normal_(0.5, 2, generator=generator)
    # Positive, so that sums do not cancel: what would be left of them is their rounding.
    grad_y = torch.empty_like(x, memory_format=layout).uniform_(0.1, 1, generator=generator)
    mask = (torch.rand(x.shape[1], device=x.device, generator=generator) > 1 / 3).float()
    first, again = run(x, grad_y, mask, activation), run(x, grad_y, mask, activation)
    if not all(torch.equal(a, b) for a, b in zip(first, again, strict=True)):
        return f"{where}: two runs on the same input differ"
    y, grad_x, grad_mask = first
    ones, zeros = torch.ones_like(mask), torch.zeros_like(mask)
    bound, expected = BOUNDS[x.dtype], torch.zeros_like(grad_mask)
    images = max(1, _CHUNK // math.prod(x.shape[1:]))
    for start in range(0, len(x), images):
        part = slice(start, start + images)
        args = (ones, zeros, None, activation)
        value = reference.forward(x[part], mask, *args)
        if (off := _difference(y[part], value)) > bound:
            return f"{where}: its output is off by {off:.1e}"
        gradient = reference.backward(grad_y[part], x[part], mask, *args)[0]
        if (off := _difference(grad_x[part], gradient)) > bound:
            return f"{where}: its gradient is off by {off:.1e}"
        expected += masked_op.mask_gradient(
            grad_y[part], x[part], ones, zeros, activation, reference.forward, reference.backward
        )
    if (off := _difference(grad_mask, expected)) > (SUM_BOUND if activation in ("none", "relu") else bound):
        return f"{where}: its mask's gradient is off by {off:.1e}"
    return None


def _difference(got: Tensor, expected: Tensor) -> float:
    """max|a-b| / max|b|; infinite when something is not a number."""
    off = float((got.float() - expected.float()).abs().max() / expected.float().abs().max().clamp_min(1e-6))
    return off if math.isfinite(off) else math.inf


def _nothing(x: Tensor, activation: str) -> None:
    """What is found against the reference itself."""
