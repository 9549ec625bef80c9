"""The masked forward with the kernel: of a search on CUDA, and of a masked network that is compiled as it is.

On CUDA it is what a search runs, once `passdeploy.kernels.selfcheck` has found it to be right there; `SWITCH` turns it
off. Where the kernel is refused, and in those of a CPU's steps that are not computed by the thin network
(`passdeploy.search.forward`), `passdeploy.groups.Masker` scales the consumers' weights instead.
benchmarks/gpu.py (section search) measures both.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from passdeploy.errors import BadInput
from passdeploy.groups import Groups, Masker, as_masks
from passdeploy.groups.masking import call_with
from passdeploy.kernels import masked_graph, masked_op, selfcheck
from passdeploy.kernels.masked_graph import MASKS, insert_masks, trace
from passdeploy.structure import Structure

SWITCH = "PASSDEPLOY_KERNELS"
"""Environment variable: ``0`` makes a search on CUDA scale weights instead of using the kernel."""


@lru_cache(maxsize=256)
def _constant(channels: int, value: float, device: torch.device) -> Tensor:
    """(channels,) float32, never written to: a search step would fill the same ones at every activation."""
    return torch.full((channels,), value, device=device)


class _MaskedActivation(torch.autograd.Function):
    """``activation(x) * mask`` with masks of zeros and ones, whose gradient reaches masked channels too.

    The kernel's own formula masks before the activation, where a ReLU's slope at 0 would hide from a masked channel
    what it is worth. So the masks' gradient is taken from the kernels as if nothing were masked.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, activation: str) -> Tensor:
        mask = mask.float()
        ctx.save_for_backward(x, mask)
        ctx.activation = activation
        ones, zeros = _constant(len(mask), 1.0, mask.device), _constant(len(mask), 0.0, mask.device)
        result: Tensor = masked_op._forward(x, mask, ones, zeros, None, activation)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (x, mask), (grad_y,) = ctx.saved_tensors, grads
        ones, zeros = _constant(len(mask), 1.0, mask.device), _constant(len(mask), 0.0, mask.device)
        grad_x = grad_mask = None
        if ctx.needs_input_grad[0]:
            grad_x = masked_op._backward(grad_y, x, mask, ones, zeros, None, ctx.activation, True, False, False)[0]
        if ctx.needs_input_grad[1]:
            grad_mask = masked_op.mask_gradient(
                grad_y,
                x,
                ones,
                zeros,
                ctx.activation,
                masked_op._forward,
                lambda *given: masked_op._backward(*given, False, True, False),
            )
        return grad_x, grad_mask, None


def trained_input(x: Tensor, masks: Tensor, index: Tensor, activation: str, last: bool) -> Tensor:
    """As `masked_input`, for training."""
    if not masked_graph.kernel_takes(x, last) or not selfcheck.trusted(x, activation):
        return masked_graph.plain_input(x, masks, index, activation, last)
    result: Tensor = _MaskedActivation.apply(x, masks[index], activation)
    return result


class KernelMasker(Masker):
    """A `Masker` that masks in the place of an activation function where it can, and scales weights elsewhere.

    Same outputs and same gradients of masks and parameters; the modules and parameters are the model's own. From the
    moment at which the self-check refuses the kernel it is an ordinary `Masker`.

    Raises:
        BadInput: The model can't be traced.
    """

    def __init__(self, model: nn.Module, groups: Groups, prefix: str = "") -> None:
        super().__init__(model, groups, prefix)
        self.graph = trace(self.model)
        sites = consumers(self)
        self.fused = insert_masks(self.graph, sites, self.total, everywhere=False, function=trained_input)
        self._everything = self._scaled
        self._scaled = [item for item in self._scaled if item.name.removesuffix(".weight") not in self.fused]

    def __call__(self, masks: Mapping[str, Tensor], *inputs: Tensor) -> Any:
        if selfcheck.refused(inputs[0].device):
            self._scaled = self._everything
            return super().__call__(masks, *inputs)
        own = {**self.parameters(masks), MASKS: self.vector(masks)}
        return call_with(self.graph, own, inputs)


def consumers(masker: Masker) -> dict[str, Tensor]:
    """Consumers that read channels one by one, and the positions of those channels' masks.

    Convolutions and linear layers; anything else keeps its masks in its weights.
    """
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    return {
        name: item.index
        for item in masker._scaled
        if isinstance(module := masker.model.get_submodule(name := item.name.removesuffix(".weight")), kinds)
        and getattr(module, "groups", 1) == 1
        and len(item.index) == (module.in_features if isinstance(module, nn.Linear) else module.in_channels)
    }


def uses_kernel(device: torch.device) -> bool:
    """Whether a search on a device masks by the kernel."""
    return device.type == "cuda" and os.environ.get(SWITCH) != "0" and selfcheck.refused(device) is None


def search_masker(model: nn.Module, groups: Groups, prefix: str = "") -> Masker:
    """What a search executes its network with: on CUDA the kernel, unless `SWITCH` or the self-check is against it.

    Args:
        model: Already on its device.
        groups: Of the network.
        prefix: Where the network lies inside `model`.
    """
    if uses_kernel(next(model.parameters()).device):
        try:
            return KernelMasker(model, groups, prefix)
        except BadInput:
            pass  # control flow that depends on data: the masks stay in the weights
    return Masker(model, groups, prefix)


def masked_network(
    model: nn.Module, groups: Groups, structure: Structure, prefix: str = "", *, plain: bool = False
) -> nn.Module:
    """A copy of a model that computes under a structure's masks with every activation still there, for compilers.

    Args:
        model: In eval mode, on the CPU.
        groups: Of the network.
        structure: The masks. Removed blocks are multiplied by 0, not left out.
        prefix: Where the network lies inside `model`.
        plain: Mask with PyTorch's multiplication, for backends that do not know the kernel.

    Raises:
        BadInput: The model can't be traced, or has consumers whose inputs can't be masked one by one.
    """
    model = copy.deepcopy(model).eval()
    masker = Masker(model, groups, prefix)
    masks = as_masks(groups.canonical(structure).masks)
    sites = consumers(masker)
    graph = trace(masker.model, evaluating=True)
    function = masked_graph.plain_input if plain else masked_graph.masked_input
    done = insert_masks(graph, sites, masker.total, everywhere=True, function=function)
    scaled = [item.name for item in masker._scaled if item.name.removesuffix(".weight") not in done]
    with torch.no_grad():
        values = masker.parameters(masks)
        own = dict(graph.named_parameters())
        if constant := next((name for name in (*scaled, *masker._gates) if name not in own), None):
            raise BadInput(
                f"compile --masked: {constant} is a constant of the network (a frozen norm's), not a parameter"
            )
        for name in (*scaled, *masker._gates):  # gates: a removed branch ends in zeros
            if name.removesuffix(".weight") in done and name in masker._gates:
                values[name] = own[name] * _gate(masker, name, masks)
            own[name].copy_(values[name])
        getattr(graph, MASKS).copy_(masker.vector(masks))
    return graph.eval()


def _gate(masker: Masker, name: str, masks: Mapping[str, Tensor]) -> Tensor:
    vector = masker.vector(masks)
    return torch.stack([vector[position] for position in masker._gates[name]]).prod()
