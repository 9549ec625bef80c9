"""PASS's prompt-conditioned recurrent hypernetwork (arXiv 2407.17412, section 3).

A small CNN encodes the visual prompt into the initial state of an LSTM. The LSTM walks the channel groups in
topological order; at each it sees the group's weight statistics and the previous group's mask, and a head turns its
state and each unit's own statistics into that unit's score. Head and pooling are shared over units and groups (ours),
so one hypernetwork fits any network and can be transferred. It is conditioned on the budget (ours), so that one search
serves several.

Earlier masks are the allocation's, known before the walk, and seen as constants (ours): gradients reach the LSTM
through the scores alone. So everything but the LSTM's own recurrence is one operator over all groups or units, which is
what makes a search step cost hardly more than a training step (benchmarks/search_cost.py).
"""

from __future__ import annotations

import math
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
        reach: The learnt correction of a log importance stays within plus and minus this; 0: no bound, and no prior to
            start from. It is none in the mean over the groups, since what all scores share decides nothing.
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
        self.lstm = nn.LSTM(hidden, hidden)
        last = nn.Linear(hidden, 1)
        self.head = nn.Sequential(nn.Linear(hidden + len(UNIT_FEATURES), hidden), nn.ReLU(), last)
        if reach:
            # The search starts at the prior and can only move away from it as the loss asks.
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def _earlier(self, hard: Sequence[Tensor]) -> Tensor:
        """(groups, POOL): what is seen of the masks before each group; ones at the first."""
        pooled = torch.stack([F.adaptive_avg_pool1d(mask[None], POOL)[0] for mask in hard])
        if self.memory == "all":
            pooled = pooled.cumsum(0) / torch.arange(1, len(pooled) + 1)[:, None]
        return torch.cat([torch.ones(1, POOL), pooled[:-1]])

    def _walk(self, seen: Tensor, start: tuple[Tensor, Tensor]) -> Tensor:
        """Maps (groups, inputs) to the LSTM's states (groups, hidden); `start` is (1, hidden) twice."""
        embedded = F.relu(self.embed(seen))
        if self.recurrence:
            states: Tensor = self.lstm(embedded, start)[0]
            return states
        apart = tuple(value[:, None].expand(-1, len(seen), -1).contiguous() for value in start)
        return self.lstm(embedded[None], apart)[0][0]  # type: ignore[no-any-return]

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
        known = statistics if self.statistics else statistics.anonymous()
        widths = [len(base) for base in prior]
        state, memory = self.initial(self.encoder(prompt)).chunk(2)
        condition = torch.full((len(prior), 1), math.log(budget))
        seen = torch.cat([known.group, known.pooled, self._earlier(cuts.hard), condition], 1)
        states = self._walk(seen, (state.tanh()[None], memory[None]))
        owner = known.owner
        delta = self.head(torch.cat([states[owner], known.units], 1))[:, 0]
        # Left in, what all scores share would drift, which decides nothing, until every tanh is at its bound and has no
        # slope left, and without a bound until importances overflow.
        delta = delta - torch.stack([part.mean() for part in delta.split(widths)]).mean()
        if self.reach:
            delta = self.reach * torch.tanh(delta / self.reach)
        scores = torch.cat(list(prior)) + delta
        soft = torch.sigmoid((scores - cuts.thresholds[owner]) / self.temperature)
        masks = torch.cat(cuts.hard) + (soft - soft.detach())  # in this order: exactly 0 or 1
        return list(scores.split(widths)), list(masks.split(widths))
