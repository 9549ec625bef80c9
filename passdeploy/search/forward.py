"""What a search computes the network's outputs with, under masks.

Where the masks are all zeros and ones and no gradient of theirs is asked for, nothing of what they remove is needed:
outputs and gradients are those of the thin network, whose weights are slices of the dense network's own. Those are what
is trained; gradients reach them through the slices, and what is removed gets none, as under masks. Such a step costs
what one of the thin network costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from passdeploy.groups import Groups
from passdeploy.groups.masking import call_with
from passdeploy.kernels import selfcheck
from passdeploy.kernels.masked_forward import KernelMasker, search_masker
from passdeploy.placing import laid_out, layout
from passdeploy.search.prompt import Prompted
from passdeploy.structure import Structure
from passdeploy.surgery import positions, thin


def kept_indices(dense: torch.Size, kept: Tensor) -> list[tuple[int, Tensor]]:
    """What was kept of a tensor, dimension by dimension, where something was cut.

    Args:
        dense: The tensor's shape before.
        kept: The thin tensor, its values the positions in the flattened dense one.

    Raises:
        ValueError: What is kept is no product of indices per dimension.
    """
    whole = kept.long()
    total, cuts = torch.zeros_like(whole), []
    for dimension, size in enumerate(dense):
        stride = dense[dimension + 1 :].numel()
        line = whole[tuple(slice(None) if d == dimension else 0 for d in range(whole.dim()))]
        index = line // stride % size
        total += (index * stride).view([-1 if d == dimension else 1 for d in range(whole.dim())])
        if len(index) < size:
            cuts.append((dimension, index))
    if not torch.equal(total, whole):
        raise ValueError(f"a tensor of shape {tuple(dense)} was not cut along its dimensions")
    return cuts


class Thinned:
    """Runs a model in training under a structure, as the thin network with the dense one's weights.

    Same values and gradients as `passdeploy.groups.Masker` under the structure's masks. Statistics of batch norms are
    updated where they were cut from; those of removed channels stay as they were.

    Args:
        model: Whose parameters are trained, on its device.
        groups: Of its network.
        structure: What is left.
        input_shape: (C, H, W) of one image.
    """

    def __init__(self, model: Prompted, groups: Groups, structure: Structure, input_shape: tuple[int, ...]) -> None:
        self.model, self.network = model, thin(model.network, groups, structure)
        device = next(model.parameters()).device
        self.network.to(device)
        self.layout = layout(self.network, device)
        if self.layout is torch.channels_last:
            self.layout = laid_out(self.network, torch.zeros(1, *input_shape, device=device))
        own, where = self._own(), positions(model.network, groups, structure)
        self.cuts: dict[str, list[tuple[int, Tensor]]] = {}
        for name in (*dict(self.network.named_parameters(remove_duplicate=False)), *self._buffers()):
            if name not in where:  # not part of the state: the thin network's own will do
                continue
            same = where[name].shape == own[name].shape
            cuts = [] if same else kept_indices(own[name].shape, where[name])
            self.cuts[name] = [(dimension, index.to(device)) for dimension, index in cuts]

    def _own(self) -> dict[str, Tensor]:
        network = self.model.network
        return {
            **dict(network.named_parameters(remove_duplicate=False)),
            **dict(network.named_buffers(remove_duplicate=False)),
        }

    def _buffers(self) -> dict[str, Tensor]:
        return dict(self.network.named_buffers(remove_duplicate=False))

    def __call__(self, images: Tensor) -> Any:
        """Maps (N, C, H, W) to what the network gives for them."""
        own, values = self._own(), {}
        for name, cuts in self.cuts.items():
            value = own[name]
            for dimension, index in cuts:
                value = value.index_select(dimension, index)
            values[name] = value.contiguous(memory_format=self.layout) if value.dim() == 4 else value
        result = call_with(self.network, values, (self.model.stage(images.contiguous(memory_format=self.layout)),))
        with torch.no_grad():
            for name in self._buffers().keys() & self.cuts.keys():
                if len(self.cuts[name]) == 1:  # statistics per channel
                    own[name].index_copy_(*self.cuts[name][0], values[name])
        return result


class Forward:
    """Runs a search's model under masks.

    Args:
        model: On its device, in training.
        groups: Of its network.
        input_shape: (C, H, W) of one image.
    """

    def __init__(self, model: Prompted, groups: Groups, input_shape: tuple[int, ...]) -> None:
        self.model, self.groups, self.input_shape = model, groups, input_shape
        self.masker = search_masker(model, groups, "network.")
        self._thinned: dict[int, tuple[tuple[Tensor, ...], Thinned]] = {}

    def masked(self, masks: Sequence[Tensor], images: Tensor) -> Any:
        """Outputs under masks, per group (units,), which may ask for gradients."""
        values = [mask.to(images.device) for mask in masks]
        return self.masker(dict(zip(self.groups.names, values, strict=True)), images)

    def kept(self, masks: tuple[Tensor, ...], images: Tensor, which: int = 0) -> Any:
        """The same under masks of zeros and ones: by the masked kernel where the search has it, else thin.

        Args:
            masks: Per group (units,).
            images: (N, C, H, W).
            which: Its thin network is kept until the masks are others.
        """
        if isinstance(self.masker, KernelMasker) and not selfcheck.refused(images.device):
            return self.masked(masks, images)
        before, thinned = self._thinned.get(which, ((), None))
        if thinned is None or any(not torch.equal(a, b) for a, b in zip(before, masks, strict=True)):
            kept = {name: tuple(mask.bool().tolist()) for name, mask in zip(self.groups.names, masks, strict=True)}
            thinned = Thinned(self.model, self.groups, Structure(kept), self.input_shape)
            self._thinned[which] = masks, thinned
        return thinned(images)
