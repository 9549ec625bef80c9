"""Weight statistics: what the hypernetwork sees of each unit and of each group.

Unit features are standardised within their group, group features are on a logarithmic scale, so that one hypernetwork
fits groups of any width and networks of any size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from passdeploy.groups import ChannelGroup, Groups
from passdeploy.groups.attention import packed_weights

UNIT_FEATURES = ("out_l1", "out_l2", "in_l2", "norm_scale", "norm_shift", "prior")
GROUP_FEATURES = ("log_out_l1", "log_norm_scale", "log_units", "is_depth", "position", "latency_share", "log_prior")
EPS = 1e-12


@dataclass(frozen=True)
class Statistics:
    """What is known of the groups.

    Attributes:
        unit: Per group (units, len(UNIT_FEATURES)).
        group: (groups, len(GROUP_FEATURES)).
        magnitude: Per group (units,): mean L1 norm of what belongs to a unit, each member scaled to mean 1.
    """

    unit: tuple[Tensor, ...]
    group: Tensor
    magnitude: tuple[Tensor, ...]

    @cached_property
    def units(self) -> Tensor:
        """The features of all groups' units, end to end: (all units, len(UNIT_FEATURES))."""
        return torch.cat(self.unit)

    @cached_property
    def owner(self) -> Tensor:
        """The group that each of them belongs to: (all units,)."""
        return torch.repeat_interleave(torch.tensor([len(features) for features in self.unit]))

    @cached_property
    def pooled(self) -> Tensor:
        """Per group the mean, the largest and the smallest of its units' features: (groups, 3 features)."""
        return torch.stack([torch.cat([unit.mean(0), unit.amax(0), unit.amin(0)]) for unit in self.unit])

    def anonymous(self) -> Statistics:
        """Nothing but each unit's index, as waves of its place in the group: the ablation."""
        unit = []
        for features in self.unit:
            place = torch.arange(len(features)) / max(1, len(features) - 1)
            angles = torch.pi * place[:, None] * torch.arange(1, 1 + features.shape[1] // 2)
            unit.append(torch.cat([angles.sin(), angles.cos()], 1))
        return Statistics(tuple(unit), torch.zeros_like(self.group), self.magnitude)


def _standardise(values: Tensor) -> Tensor:
    if len(values) < 2:
        return torch.zeros_like(values)
    return (values - values.mean()) / (values.std() + 1e-6)


def _per_unit(norms: Tensor, channels: Tensor) -> Tensor:
    """Mean over each unit's channels: (all channels,), (units, per unit) -> (units,)."""
    return norms[channels].mean(1)


def _member_norms(network: nn.Module, group: ChannelGroup) -> dict[str, list[Tensor]]:
    """Per kind of norm, one (units,) tensor per member that has it."""
    found: dict[str, list[Tensor]] = {"out_l1": [], "out_l2": [], "in_l2": [], "norm_scale": [], "norm_shift": []}
    for member in group.members:
        module = network.get_submodule(member.module)
        packed = packed_weights(module, [unit[0] for unit in member.channels]) if member.side == "out" else None
        if packed is not None:
            found["out_l1"].append(packed.float().cpu().abs().mean(1))
            found["out_l2"].append(packed.float().cpu().square().mean(1).sqrt())
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or isinstance(module, nn.PReLU):  # slopes are no norm's scales
            continue
        weight = weight.detach().float().cpu()
        channels = torch.tensor(member.channels)
        if weight.ndim == 1:
            if member.side == "out" and len(weight) == member.size:
                found["norm_scale"].append(_per_unit(weight.abs(), channels))
                bias = getattr(module, "bias", None)
                if isinstance(bias, Tensor):
                    found["norm_shift"].append(_per_unit(bias.detach().float().cpu(), channels))
            continue
        transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
        side = 0 if (member.side == "out") != transposed else 1
        if weight.shape[side] != member.size:
            continue  # a grouped convolution's other side
        flat = weight.transpose(0, side).flatten(1)
        if member.side == "out":
            found["out_l1"].append(_per_unit(flat.abs().mean(1), channels))
            found["out_l2"].append(_per_unit(flat.square().mean(1).sqrt(), channels))
        else:
            found["in_l2"].append(_per_unit(flat.square().mean(1).sqrt(), channels))
    return found


def _branch_norms(network: nn.Module, group: ChannelGroup) -> dict[str, Tensor]:
    """Mean norms over the modules of a residual branch, as a single unit's."""
    weights = [getattr(network.get_submodule(name), "weight", None) for name in group.branch]
    tensors = [w.detach().float().cpu() for w in weights if isinstance(w, Tensor)]
    matrices = [w for w in tensors if w.ndim > 1] or [torch.ones(1, 1)]
    gate = getattr(network.get_submodule(group.gate), "weight", None) if group.gate else None
    scale = gate.detach().float().abs().mean().cpu() if isinstance(gate, Tensor) else torch.tensor(1.0)
    return {"out_l1": torch.stack([w.abs().mean() for w in matrices]).mean()[None], "norm_scale": scale[None]}


def collect(network: nn.Module, groups: Groups, prior: dict[str, Tensor], latency_share: Tensor) -> Statistics:
    """Computes all statistics.

    Args:
        network: Its weights.
        groups: Of the network.
        prior: Per group (units,), log importance that the scores start from; zeros without one.
        latency_share: (groups,), share of the dense latency that goes when the group is at its smallest.
    """
    units, rows, magnitudes = [], [], []
    for index, group in enumerate(groups.groups):
        if group.kind == "depth":
            means = _branch_norms(network, group)
            magnitude = torch.ones(1)
        else:
            norms = _member_norms(network, group)
            means = {
                key: torch.stack(values).mean(0) if values else torch.ones(group.units) for key, values in norms.items()
            }
            scaled = [v / (v.mean() + EPS) for key in ("out_l1", "in_l2", "norm_scale") for v in norms[key]]
            magnitude = torch.stack(scaled).mean(0) if scaled else torch.ones(group.units)
        log_prior = prior[group.name].float()
        logs = {key: (values if key == "norm_shift" else (values + EPS).log()) for key, values in means.items()}
        columns = [_standardise(logs[key]) if key in logs else torch.zeros(group.units) for key in UNIT_FEATURES[:-1]]
        units.append(torch.stack([*columns, _standardise(log_prior)], 1))
        rows.append(
            [
                float(logs["out_l1"].mean()),
                float(logs["norm_scale"].mean()),
                float(torch.tensor(float(group.units)).log()),
                float(group.kind == "depth"),
                index / max(1, len(groups.groups) - 1),
                float(latency_share[index]),
                float(log_prior.mean()),
            ]
        )
        magnitudes.append(magnitude)
    table = torch.tensor(rows)
    table = (table - table.mean(0)) / (table.std(0) + 1e-6) if len(rows) > 1 else torch.zeros_like(table)
    return Statistics(tuple(units), table, tuple(magnitudes))
