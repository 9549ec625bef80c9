"""PASS's prompt-conditioned recurrent hypernetwork (arXiv 2407.17412, section 3).

A small CNN encodes the visual prompt into the initial state of an LSTM. The LSTM walks the channel groups in
topological order; at each it sees the group's weight statistics and the previous group's mask, and a head turns its
state and each unit's own statistics into that unit's score. Head and pooling are shared over units and groups (ours),
so one hypernetwork fits any network and can be transferred. It is conditioned on the budget (ours), so that one search
serves several.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from passdeploy.search.statistics import GROUP_FEATURES, UNIT_FEATURES, Statistics

POOL = 16
"""Length to which a mask of any width is pooled."""


class PromptEncoder(nn.Module):
    """Three strided convolutions and a global average: (3, H, W) -> (features,)."""

    def __init__(self, features: int) -> None:
        super().__init__()
        widths = (3, 16, 32, features)
        layers: list[nn.Module] = []
        for cin, cout in pairwise(widths):
            layers += [nn.Conv2d(cin, cout, 3, 2, 1), nn.ReLU()]
        self.layers = nn.Sequential(*layers)

    def forward(self, prompt: Tensor) -> Tensor:
        """Encodes the prompt."""
        return self.layers(prompt[None]).mean((2, 3))[0]


@dataclass(frozen=True)
class Cuts:
    """The decision the scores are binarised against: from the allocator, constant between its solutions.

    Attributes:
        thresholds: (groups,): log importance at which a unit of the group is kept or not.
        hard: Per group (units,), 1 = kept.
    """

    thresholds: Tensor
    hard: tuple[Tensor, ...]


class HyperNetwork(nn.Module):
    """Scores every unit of every group.

    Args:
        hidden: Width of the LSTM's state.
        recurrence: False: each group starts from the prompt's state (ablation).
        statistics: False: units are told apart by their index only (ablation).
        temperature: Of the sigmoid behind the straight-through masks.
        reach: The learnt correction of a log importance stays within plus and minus this; 0: no bound,
            and no prior to start from.
        memory: What is seen of earlier masks: the ``previous`` group's (the paper), or the mean over ``all`` of them.
    """

    def __init__(
        self,
        hidden: int = 64,
        recurrence: bool = True,
        statistics: bool = True,
        temperature: float = 0.5,
        reach: float = 3.0,
        memory: str = "previous",
    ) -> None:
        super().__init__()
        self.recurrence, self.statistics = recurrence, statistics
        self.temperature, self.reach, self.memory = temperature, reach, memory
        self.encoder = PromptEncoder(hidden)
        self.initial = nn.Linear(hidden, 2 * hidden)
        inputs = len(GROUP_FEATURES) + 3 * len(UNIT_FEATURES) + POOL + 1
        self.embed = nn.Linear(inputs, hidden)
        self.cell = nn.LSTMCell(hidden, hidden)
        last = nn.Linear(hidden, 1)
        self.head = nn.Sequential(nn.Linear(hidden + len(UNIT_FEATURES), hidden), nn.ReLU(), last)
        if reach:
            # The search starts at the prior and can only move away from it as the loss asks.
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def _units(self, statistics: Statistics, group: int) -> Tensor:
        features = statistics.unit[group]
        if self.statistics:
            return features
        index = torch.arange(len(features)) / max(1, len(features) - 1)
        waves = torch.arange(1, 1 + features.shape[1] // 2)
        angles = torch.pi * index[:, None] * waves
        return torch.cat([angles.sin(), angles.cos()], 1)

    def forward(
        self, prompt: Tensor, statistics: Statistics, prior: Sequence[Tensor], cuts: Cuts, budget: float
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Scores all groups.

        Args:
            prompt: (3, H, W), as it is added to the normalised image.
            statistics: Of the groups.
            prior: Per group (units,), log importance that the scores start from.
            cuts: Thresholds and masks of the current allocation.
            budget: Asked share of the dense latency, in (0, 1].

        Returns:
            Per group the scores (units,), as log importances, and the straight-through masks (units,): exactly 0 or 1,
            with the gradient of ``sigmoid((score - threshold) / temperature)``.
        """
        state, memory = self.initial(self.encoder(prompt)).chunk(2)
        start = (state.tanh()[None], memory[None])
        carried = start
        condition = torch.tensor([budget]).log()
        previous = torch.ones(POOL)
        scores, masks, pooled_masks = [], [], []
        for g, base in enumerate(prior):
            units = self._units(statistics, g)
            pooled = torch.cat([units.mean(0), units.amax(0), units.amin(0)])
            known = statistics.group[g] if self.statistics else torch.zeros(len(GROUP_FEATURES))
            seen = torch.cat([known, pooled, previous, condition])
            carried = self.cell(F.relu(self.embed(seen))[None], carried if self.recurrence else start)
            delta = self.head(torch.cat([carried[0].expand(len(units), -1), units], 1))[:, 0]
            score = base + (self.reach * torch.tanh(delta / self.reach) if self.reach else delta)
            soft = torch.sigmoid((score - cuts.thresholds[g]) / self.temperature)
            mask = cuts.hard[g] + (soft - soft.detach())  # in this order: exactly 0 or 1
            pooled_masks.append(F.adaptive_avg_pool1d(mask[None], POOL)[0])
            previous = pooled_masks[-1] if self.memory == "previous" else torch.stack(pooled_masks).mean(0)
            scores.append(score)
            masks.append(mask)
        return scores, masks
