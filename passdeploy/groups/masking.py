"""Masked execution: the network as if units were gone, without touching a single activation.

A mask belongs on the activations that consumers read: a batch norm after a concatenation, a sigmoid or a bias between
producer and consumer turn zeros into non-zeros. Scaling a consumer's weight along its input channels is mathematically
the same, costs next to nothing and is differentiable in the mask. A residual branch is gated at the module whose zero
output makes the branch zero: its weight and bias are scaled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from passdeploy.groups.attention import gate_name
from passdeploy.groups.types import Groups
from passdeploy.weights import unwrap


@dataclass
class _Scaled:
    """A parameter that masks scale along one dimension.

    Attributes:
        name: Qualified, with the prefix.
        index: For every channel, the position of its mask in the vector of all masks (its last entry is 1).
        shape: Broadcasts the gathered masks over the parameter.
    """

    name: str
    index: Tensor
    shape: tuple[int, ...]


def _consumer_dimension(module: nn.Module) -> int:
    """The dimension of a consumer's weight that runs over its input channels."""
    return 0 if getattr(module, "transposed", False) else 1


def call_with(model: nn.Module, changed: Mapping[str, Tensor], inputs: tuple[Tensor, ...]) -> Any:
    """Runs a model with other parameters in the place of some of its own, which are there again afterwards.

    A module that is registered under two names has one place for its weight. PyTorch's own handling of ties would put
    the changed weight there once per name, and what it puts back at the end would be the changed one. Nothing needs
    that handling: parameters that modules share are never masked (`passdeploy.groups.wrapped.uncuttable`).
    """
    return torch.func.functional_call(model, dict(changed), inputs, tie_weights=False)


class Masker:
    """Executes a network under masks; everything that does not depend on them is worked out once.

    Args:
        model: The module that is executed, such as the network, or a `Prompted` around it.
        groups: Of the network.
        prefix: Where the network lies inside `model`: ``"network."`` for `Prompted`.
    """

    def __init__(self, model: nn.Module, groups: Groups, prefix: str = "") -> None:
        model = unwrap(model)
        self.model, self.names = model, groups.names
        offsets, total = {}, 0
        for group in groups.groups:
            offsets[group.name] = total
            total += group.units
        self.total = total
        modules = dict(model.named_modules())
        index: dict[str, Tensor] = {}
        gates: dict[str, list[int]] = {}
        for group in groups.groups:
            if group.kind == "depth":
                gates.setdefault(gate_name(model, prefix + group.gate), []).append(offsets[group.name])
            for member in group.members:
                if member.side != "in":
                    continue
                name = prefix + member.module
                weight = modules[name].weight
                assert isinstance(weight, Tensor)
                if name not in index:
                    index[name] = torch.full((weight.shape[_consumer_dimension(modules[name])],), total)
                channels = torch.tensor(member.channels)
                index[name][channels] = (offsets[group.name] + torch.arange(group.units))[:, None]
        self._scaled = []
        for name, where in index.items():
            weight = modules[name].weight
            assert isinstance(weight, Tensor)
            dimension = _consumer_dimension(modules[name])
            shape = tuple(-1 if d == dimension else 1 for d in range(weight.ndim))
            self._scaled.append(_Scaled(f"{name}.weight", where, shape))
        self._gates = {
            f"{name}.{kind}": where
            for name, where in gates.items()
            for kind in ("weight", "bias")
            if getattr(modules[name], kind, None) is not None
        }

    def vector(self, masks: Mapping[str, Tensor]) -> Tensor:
        """All masks end to end, and a 1 for the channels that belong to no group: (total + 1,)."""
        parts = [masks[name] for name in self.names]
        one = torch.ones(1, dtype=parts[0].dtype, device=parts[0].device) if parts else torch.ones(1)
        return torch.cat([*parts, one])

    def parameters(self, masks: Mapping[str, Tensor], own: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The parameters under masks, by qualified name, for `torch.func.functional_call`.

        Args:
            masks: Per group, a float vector (units,), differentiable; a depth group's has one entry.
            own: The parameters to scale; None: the model's own.
        """
        own = own if own is not None else dict(self.model.named_parameters())
        vector = self.vector(masks)
        changed: dict[str, Tensor] = {}
        for item in self._scaled:
            weight = own[item.name]
            if item.index.device != vector.device:
                item.index = item.index.to(vector.device)
            changed[item.name] = weight * vector[item.index].view(item.shape).to(weight.dtype)
        for name, positions in self._gates.items():
            value = changed[name] if name in changed else own[name] if name in own else self.model.get_buffer(name)
            for position in positions:
                value = value * vector[position].to(value.dtype)
            changed[name] = value
        return changed

    def __call__(self, masks: Mapping[str, Tensor], *inputs: Tensor) -> Any:
        """Runs the model under masks."""
        return call_with(self.model, self.parameters(masks), inputs)


def as_masks(masks: Mapping[str, Sequence[bool]], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A structure's masks as float vectors."""
    return {name: torch.tensor(mask, dtype=dtype) for name, mask in masks.items()}
