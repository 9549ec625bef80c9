"""What the magnitude baselines look at: for each unit, the slices of the tensors it lives in."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from passdeploy.groups import ChannelGroup, Groups
from passdeploy.groups.attention import packed_weights
from passdeploy.groups.types import Side


def slices(network: nn.Module, group: ChannelGroup) -> Iterator[tuple[Side, bool, Tensor]]:
    """Yields, per member with a weight, (side, is a norm, (units, values) of what goes with each unit)."""
    for member in group.members:
        module = network.get_submodule(member.module)
        packed = packed_weights(module, [unit[0] for unit in member.channels]) if member.side == "out" else None
        if packed is not None:
            yield "out", False, packed.float().cpu()
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or isinstance(module, nn.PReLU):  # slopes are no norm's scales
            continue
        weight = weight.detach().float().cpu()
        if weight.ndim == 1:
            if member.side != "out" or len(weight) != member.size:
                continue
            flat = weight[:, None]
        else:
            transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
            side = 0 if (member.side == "out") != transposed else 1
            if weight.shape[side] != member.size:
                continue  # the other side of a grouped convolution
            flat = weight.transpose(0, side).flatten(1)
        yield member.side, weight.ndim == 1, flat[torch.tensor(member.channels)].flatten(1)


def blocks_last(importance: dict[str, Tensor], groups: Groups) -> dict[str, Tensor]:
    """Completes importances of channel groups: blocks get more than any channel, for methods that prune width only."""
    most = max((float(values.max()) for values in importance.values()), default=1.0)
    return {
        group.name: importance[group.name] if group.kind == "channel" else torch.full((1,), 10 * most + 1.0)
        for group in groups.groups
    }


def scaled(values: Tensor) -> Tensor:
    """Scaled to mean 1, so that groups can be compared with each other."""
    return values / values.mean().clamp_min(1e-12)
