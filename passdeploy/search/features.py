"""Matching the dense network's features under masks: what tells co-adapting weights most in the few steps of a search.

A masked network has the dense one's shapes, so its features can be held against the dense ones channel by channel
(FitNets, Romero et al., arXiv 1412.6550, without their regressors), as far as they are kept. They are taken where a
stream ends: at the last module that reads a group of channels which several modules read. What happens inside a stream
is left free, since blocks may be gone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from passdeploy.groups import ChannelGroup, Groups, Masker, Member
from passdeploy.teacher import Teacher

MOST = 8
"""Points at most, spread evenly: the features of each are kept until the backward pass."""
EPS = 1e-6


@dataclass(frozen=True)
class Point:
    """Where features are taken.

    Attributes:
        group: The channel group that is read there.
        member: The module that reads it.
    """

    group: ChannelGroup
    member: Member


def points_of(network: nn.Module, groups: Groups) -> list[Point]:
    """The last reader of each stream; of each group where there are no streams.

    Args:
        network: Its modules' order of definition stands for the order of execution.
        groups: Of the network.
    """
    order = {name: place for place, (name, _) in enumerate(network.named_modules())}
    readers = {
        group: [m for m in group.members if m.side == "in"] for group in groups.groups if group.kind == "channel"
    }
    read = {group: members for group, members in readers.items() if members}
    streams = {group: members for group, members in read.items() if len({m.module for m in members}) > 1} or read
    points = [Point(group, max(members, key=lambda m: order[m.module])) for group, members in streams.items()]
    keep = {round(n * (len(points) - 1) / max(1, MOST - 1)) for n in range(MOST)}
    return [point for place, point in enumerate(points) if len(points) <= MOST or place in keep]


class _Recorder:
    """The latest input of some modules."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.inputs: dict[str, Tensor] = {}
        modules = dict(model.named_modules())
        for name in names:
            if name in modules:
                modules[name].register_forward_pre_hook(self._keeper(name))

    def _keeper(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self.inputs[name] = inputs[0]

        return keep


class FeatureMatch:
    """Distance between the features of a masked network and those of the dense one in their latest forward passes.

    Args:
        masker: Executes the network that is trained.
        teacher: Executes the dense one.
        groups: Of the network.
        prefix: Where the network lies inside both.
    """

    def __init__(self, masker: Masker, teacher: Teacher, groups: Groups, prefix: str = "") -> None:
        self.points = points_of(masker.model.get_submodule(prefix.rstrip(".")), groups)
        self.prefix = prefix
        names = [prefix + point.member.module for point in self.points]
        self._mine, self._dense = _Recorder(masker.model, names), _Recorder(teacher.module, names)
        modules = dict(masker.model.named_modules())
        self._reads_last = {name for name in names if isinstance(modules[name], nn.Linear)}
        # By module and group: what reads a concatenation reads several.
        self._channels = {(p.member.module, p.group.name): torch.tensor(p.member.channels) for p in self.points}
        # Where the kernel masks activations, what a module reads is masked already.
        self._masked = frozenset(getattr(masker, "fused", ()))

    def __call__(self, masks: Mapping[str, Tensor]) -> Tensor:
        """Mean over the points of the squared distance on kept channels, over the dense features' square there.

        Args:
            masks: Those of the forward pass: per group (units,), exactly 0 or 1.
        """
        parts = []
        for point in self.points:
            name = self.prefix + point.member.module
            mine, dense = self._mine.inputs.get(name), self._dense.inputs.get(name)
            if mine is None or dense is None or mine.shape != dense.shape:
                continue  # a module that the dense network is run without
            mask = self._over_channels(point, masks[point.group.name], mine.ndim)
            mine, dense = mine.float(), dense.float() * mask.detach()
            if name not in self._masked:
                mine = mine * mask
            parts.append((mine - dense).square().sum() / (dense.square().sum() + EPS))
        self._mine.inputs.clear()  # the graph of this step must not live into the next one
        self._dense.inputs.clear()
        return torch.stack(parts).mean() if parts else torch.zeros(())

    def _over_channels(self, point: Point, mask: Tensor, dimensions: int) -> Tensor:
        """A group's mask (units,), spread over the channels of what a module reads; those of other groups are 0."""
        key = point.member.module, point.group.name
        channels = self._channels[key] = self._channels[key].to(mask.device)
        spread = mask.new_zeros(point.member.size)
        spread = spread.index_put((channels.flatten(),), mask[:, None].expand_as(channels).flatten())
        # Linear layers read channels last, convolutions second.
        last = self.prefix + point.member.module in self._reads_last
        return spread if last else spread.view(-1, *(1,) * (dimensions - 2))
