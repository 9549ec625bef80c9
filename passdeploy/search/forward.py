"""What a search computes the network's outputs with, under masks.

Where the masks are all zeros and ones and no gradient of theirs is asked for, nothing of what they remove is needed:
outputs and gradients are those of the thin network, whose weights are slices of the dense network's own. Those are what
is trained; gradients reach them through the slices, and what is removed gets none, as under masks. On a CPU such a step
costs little more than one of the thin network. On a GPU, where cutting a network anew may take as long as several steps
(not measured), masks are multiplied with: by the kernel, or as scaled weights (`passdeploy.kernels.masked_forward`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from passdeploy.groups import Groups
from passdeploy.kernels.masked_forward import search_masker
from passdeploy.placing import ease_norms, layout
from passdeploy.search.prompt import Prompted
from passdeploy.structure import Structure
from passdeploy.surgery import numbered, thin


def kept_indices(dense: torch.Size, kept: Tensor) -> list[tuple[int, Tensor]]:
    """What was kept of a tensor, dimension by dimension, where something was cut.

    Args:
        dense: The tensor's shape before.
        kept: The thin tensor, its values the positions in the flattened dense one.

    Raises:
        ValueError: What is kept is no product of indices per dimension.
    """
    total, cuts = torch.zeros_like(kept), []
    for dimension, size in enumerate(dense):
        stride = dense[dimension + 1 :].numel()
        line = kept[tuple(slice(None) if d == dimension else 0 for d in range(kept.dim()))]
        index = line.long() // stride % size
        total += (index * stride).view([-1 if d == dimension else 1 for d in range(kept.dim())])
        if len(index) < size:
            cuts.append((dimension, index))
    if not torch.equal(total, kept):
        raise ValueError(f"a tensor of shape {tuple(dense)} was not cut along its dimensions")
    return cuts


@dataclass(frozen=True)
class _Slice:
    """A parameter or buffer of the thin network, and what it is a slice of.

    Attributes:
        thin: The module whose it is in the thin network.
        dense: The same in the dense one.
        name: Of the tensor in both.
        buffer: Whether it is a buffer.
        cuts: Dimensions with the indices that are left of them.
    """

    thin: nn.Module
    dense: nn.Module
    name: str
    buffer: bool
    cuts: list[tuple[int, Tensor]]

    def place(self) -> dict[str, Tensor | None]:
        """Where it is registered in the thin network."""
        return self.thin._buffers if self.buffer else self.thin._parameters  # type: ignore[return-value]

    def whole(self) -> Tensor:
        value: Tensor = getattr(self.dense, self.name)
        return value

    def taken(self, layout: torch.memory_format) -> Tensor:
        """What is left of the dense network's, as it is by now."""
        value = self.whole()
        for dimension, index in self.cuts:
            value = value.index_select(dimension, index)
        return value.contiguous(memory_format=layout) if value.dim() == 4 and not self.buffer else value

    @torch.no_grad()
    def given_back(self) -> None:
        """Writes a buffer that training moved into the dense network's."""
        now, whole = self.place()[self.name], self.whole()
        if now is None or now is whole:
            return
        if not self.cuts:
            whole.copy_(now)
            return
        kept = [torch.arange(size, device=whole.device) for size in whole.shape]
        for dimension, index in self.cuts:
            kept[dimension] = index
        whole[torch.meshgrid(*kept, indexing="ij")] = now.to(whole)


class Thinned:
    """Runs a model in training under a structure, as the thin network with the dense one's weights.

    Same values and gradients as `passdeploy.groups.Masker` under the structure's masks. Buffers, such as the statistics
    of batch norms, are updated where they were cut from; those of removed channels stay as they were.

    Args:
        model: Whose parameters are trained, on the CPU.
        twin: Its network, `numbered` before it was run: what a forward pass leaves in a module may not be copied.
        groups: Of the network.
        structure: What is left.
        how: How the dense network's images lie.
    """

    def __init__(
        self, model: Prompted, twin: nn.Module, groups: Groups, structure: Structure, how: torch.memory_format
    ) -> None:
        self.model, self.network = model, thin(twin, groups, structure).train(model.network.training)
        self.layout = layout(self.network, torch.device("cpu")) if how is torch.channels_last else how
        ease_norms(self.network)
        where = self.network.state_dict()
        dense = dict(model.network.named_modules(remove_duplicate=False))
        self.slices: list[_Slice] = []
        for path, module in self.network.named_modules():  # one that is registered twice has one place for its weight
            for registered in (module._parameters, module._buffers):
                for name in registered:
                    full = f"{path}.{name}" if path else name
                    if full not in where:  # not part of the state: the thin network's own will do
                        continue
                    owner, kept = dense[path], where.pop(full)
                    shape = getattr(owner, name).shape
                    cuts = [] if kept.shape == shape else kept_indices(shape, kept)
                    self.slices.append(_Slice(module, owner, name, registered is module._buffers, cuts))

    def __call__(self, images: Tensor) -> Any:
        """Maps (N, C, H, W) to what the network gives for them."""
        for each in self.slices:  # and there they stay: a checkpointed forward pass is run again in the backward one
            each.place()[each.name] = each.taken(self.layout)
        result = self.network(self.model.stage(images.contiguous(memory_format=self.layout)))
        for each in self.slices:
            if each.buffer:
                each.given_back()
        return result


class Forward:
    """Runs a search's model under masks.

    Args:
        model: On its device, in training.
        groups: Of its network.
        how: How its images lie (`passdeploy.placing.place`).
    """

    def __init__(self, model: Prompted, groups: Groups, how: torch.memory_format) -> None:
        self.model, self.groups, self.how = model, groups, how
        on_cpu = next(model.parameters()).device.type == "cpu"
        self.twin = numbered(model.network) if on_cpu else None
        self.masker = search_masker(model, groups, "network.")
        self._thinned: dict[int, tuple[tuple[Tensor, ...], Thinned]] = {}

    def masked(self, masks: Sequence[Tensor], images: Tensor) -> Any:
        """Outputs under masks, per group (units,), which may ask for gradients."""
        values = [mask.to(images.device) for mask in masks]
        return self.masker(dict(zip(self.groups.names, values, strict=True)), images)

    def kept(self, masks: tuple[Tensor, ...], images: Tensor, which: int = 0) -> Any:
        """The same under masks of zeros and ones: on a CPU by the thin network.

        Args:
            masks: Per group (units,).
            images: (N, C, H, W).
            which: Its thin network is kept until the masks are others.
        """
        if self.twin is None:
            return self.masked(masks, images)
        before, thinned = self._thinned.get(which, ((), None))
        if thinned is None or any(not torch.equal(a, b) for a, b in zip(before, masks, strict=True)):
            kept = {name: tuple(mask.bool().tolist()) for name, mask in zip(self.groups.names, masks, strict=True)}
            self._thinned.pop(which, None)  # before another one is made
            thinned = Thinned(self.model, self.twin, self.groups, Structure(kept), self.how)
            self._thinned[which] = masks, thinned
        return thinned(images)
