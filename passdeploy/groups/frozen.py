"""Batch norms whose statistics and affine parameters are buffers, as in the backbones of detectors.

torchvision's `FrozenBatchNorm2d`, and those of other libraries that are called so, compute what a batch norm does in
evaluation out of plain operations. To the dependency graph, to symbolic traces and to the exporter they are the batch
norm; what is cut, masked and shipped is the network's own module.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from passdeploy.groups.wrapped import replace_module

_VALUES = ("weight", "bias", "running_mean", "running_var")


def is_frozen_norm(module: nn.Module) -> bool:
    """Whether a module is called a frozen batch norm and holds what one does, as buffers of its own."""
    if not type(module).__name__.endswith("FrozenBatchNorm2d") or any(True for _ in module.parameters()):
        return False
    values = [module._buffers.get(name) for name in _VALUES]
    return all(isinstance(v, Tensor) and v.ndim == 1 for v in values) and len({len(v) for v in values}) == 1  # type: ignore[arg-type]


def frozen_channels(module: nn.Module) -> int | None:
    """Channels of a frozen batch norm; None for another module."""
    weight = module._buffers.get("weight") if is_frozen_norm(module) else None
    return None if weight is None else len(weight)


@torch.no_grad()
def _as_batch_norm(module: nn.Module) -> nn.BatchNorm2d | None:
    """The batch norm that shares a frozen one's tensors; None when that computes something else."""
    values = {name: module.get_buffer(name) for name in _VALUES}
    weight = values["weight"]
    norm = nn.BatchNorm2d(len(weight), float(getattr(module, "eps", 1e-5)), device=weight.device, dtype=weight.dtype)
    for name, value in values.items():
        setattr(norm, name, value if name.startswith("running") else nn.Parameter(value))
    images = torch.rand(1, len(weight), 2, 2, generator=torch.Generator().manual_seed(0)).to(weight)
    try:
        same = torch.allclose(norm.eval()(images), module(images), rtol=1e-4, atol=1e-5)
    except Exception:  # a library's own business
        return None
    return norm if same else None


def thaw(model: nn.Module) -> dict[str, nn.Module]:
    """Puts batch norms that share their tensors in the place of frozen ones, in place; returns what was there."""
    found: dict[str, nn.Module] = {}
    for name, module in list(model.named_modules()):
        norm = _as_batch_norm(module) if name and is_frozen_norm(module) else None
        if norm is not None:
            found[name] = module
            replace_module(model, name, norm)
    return found


@contextlib.contextmanager
def thawed(model: nn.Module) -> Iterator[None]:
    """For as long as it lasts, a network's frozen batch norms are batch norms; what these learn, they keep."""
    before = thaw(model)
    try:
        yield
    finally:
        for name, module in before.items():
            replace_module(model, name, module)
