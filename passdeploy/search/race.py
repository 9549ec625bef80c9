"""Which blocks go, decided by trial (ours).

Sensitivities are measured with the dense network's weights, one block at a time. Sets of blocks whose summed losses lie
close together are not told apart by them, and after training they differ by more than any choice of widths. So the
likeliest sets are tried: each with its best widths, rebuilt thin and trained from the dense network's weights on the
same batches, the worse half given up half way (successive halving, Jamieson and Talwalkar, arXiv 1502.07943).

All entrants see a batch together, with targets that are computed once. What they take is counted in steps of the dense
network, by multiply-adds, and taken off the search's steps.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from passdeploy.groups import macs
from passdeploy.placing import layout, place
from passdeploy.search.allocator import Allocation, Allocator, Importance
from passdeploy.search.method import SearchContext
from passdeploy.search.prompt import Prompted
from passdeploy.search.state import State
from passdeploy.surgery import put_back, thin
from passdeploy.tasks import task_of
from passdeploy.teacher import Teacher
from passdeploy.training import (
    LARGEST_GRADIENT,
    TrainSettings,
    autocast,
    finite,
    parameter_groups,
    task_loss,
    training_batches,
    training_device,
)

SHARE = 0.75
"""Of a budget's steps, what its trials may take."""
SHORTEST, LONGEST = 24, 32
"""Steps of each half. In fewer, what removal broke decides, and not what training can make good."""
WARM_UP = 16
"""Steps over which the rate rises."""
GENTLY = 0.4
"""Rate in trials, in the search's. The order is the same at either, but what is trained gently is worth more to the
fine-tuning after it: 91.95 against 91.73 % (ResNet-20, Fashion-MNIST, 3x, four seeds)."""
PAIRED = 4
"""Blocks that are also changed two at a time: those of least expected loss alone."""
BACKWARD = 2
"""Multiply-adds of a backward pass, in forward passes."""


def removable(allocator: Allocator) -> tuple[str, ...]:
    """Names of the depth groups that the allocator may remove."""
    groups = zip(allocator.groups.names, allocator.depth, allocator.grids, strict=True)
    return tuple(name for name, depth, grid in groups if depth and len(grid) > 1)


def blocks_of(allocation: Allocation, names: tuple[str, ...]) -> dict[str, bool]:
    """Whether each of the depth groups stays."""
    return {name: any(allocation.structure.masks[name]) for name in names}


def alternatives(allocator: Allocator, importance: Importance, target_ms: float, most: int) -> list[Allocation]:
    """The allocation, and the best of those in which one or two blocks had to be decided otherwise, by expected loss.

    Args:
        allocator: Of the search.
        importance: What it goes by.
        target_ms: Predicted latency that each must keep.
        most: So many at most.

    Returns:
        No two with the same blocks; none when the target can't be reached.
    """
    first = allocator.solve(importance, target_ms)
    if first is None or most == 1:
        return [] if first is None else [first]
    names, cost = removable(allocator), allocator.tables(importance)
    blocks = blocks_of(first, names)

    def otherwise(*changed: str) -> Allocation | None:
        return allocator.holding({name: not blocks[name] for name in changed}).solve(importance, target_ms)

    def loss(allocation: Allocation) -> float:
        return float(allocator.losses(allocation.widths[None], cost)[0])

    single = {name: found for name in names if (found := otherwise(name)) is not None}
    likeliest = sorted(single, key=lambda name: loss(single[name]))[:PAIRED]
    double = [found for pair in combinations(likeliest, 2) if (found := otherwise(*pair)) is not None]
    distinct = {tuple(blocks.values()): first}
    for each in sorted([*single.values(), *double], key=loss):
        distinct.setdefault(tuple(blocks_of(each, names).values()), each)
    return list(distinct.values())[:most]


def halves(entrants: int) -> tuple[int, int]:
    """How many entrants train in the first half of the race, and how many in the second."""
    return entrants, max(2, (entrants + 1) // 2)


def race_length(steps: float, step_costs: list[float], shared: float) -> tuple[int, int]:
    """How many entrants a race has, and how many steps each half of it: (0, 0) where there are too few steps for any.

    Args:
        steps: Of the dense network, that may be spent.
        step_costs: What a step of each entrant takes, in those; the likeliest come first.
        shared: What a batch takes for all of them, likewise.
    """
    for entrants in range(len(step_costs), 1, -1):
        costs = sorted(step_costs[:entrants], reverse=True)
        length = int(steps / sum(shared + sum(costs[:count]) for count in halves(entrants)))
        if length >= SHORTEST:
            return entrants, min(length, LONGEST)
    return 0, 0


@dataclass(eq=False)
class Entrant:
    """A set of blocks, and its training.

    Attributes:
        allocation: Its best widths.
        blocks: Per depth group, whether it stays.
        cost: What a step takes, in steps of the dense network.
        model: The thin network.
        optimiser: Of its weights and prompt.
        layout: How its images lie in memory.
        losses: Of its steps.
    """

    allocation: Allocation
    blocks: dict[str, bool]
    cost: float
    model: Prompted
    optimiser: torch.optim.Optimizer
    layout: torch.memory_format
    losses: list[float] = field(default_factory=list)

    def judged(self) -> float:
        """The mean loss in the later half of its steps."""
        late = self.losses[len(self.losses) // 2 :]
        return sum(late) / max(1, len(late))

    def told(self) -> str:
        """Its blocks and its loss."""
        gone = ", ".join(name.removeprefix("depth:") for name, stays in self.blocks.items() if not stays)
        return f"without {gone or 'none'} {self.judged():.3f} ({len(self.losses)} steps)"


class Race:
    """Trains sets of blocks against each other, for one budget.

    Args:
        context: Of the search.
        search: What is trained in it; its weights are still the dense network's, and stay so.
        teacher: None without distillation.
        settings: Of the search's training.
        ratio: Asked share of the dense latency.
        steps: That the budget has.

    Attributes:
        entrants: Those that are left, the best first once it is over; none where nothing is to be decided.
        steps: That each of them has trained.
        spent: What all took, in steps of the dense network.
    """

    def __init__(
        self,
        context: SearchContext,
        search: State,
        teacher: Teacher | None,
        settings: TrainSettings,
        ratio: float,
        steps: float,
    ) -> None:
        self.context, self.search, self.teacher, self.settings = context, search, teacher, settings
        self.device, self.task = training_device(), task_of(context.data)
        self.layout = layout(search.model, self.device)
        allocator, config = search.allocator, context.config.search
        wanted = config.trials > 1 and config.co_adapt and ratio < 1
        target_ms = ratio * allocator.dense_ms
        found = alternatives(allocator, search.start(), target_ms, config.trials) if wanted else []
        forward, whole = 0.0 if teacher is None else 1.0, macs(context.operators)
        dense_step = forward + 1 + BACKWARD
        self.shared = forward / dense_step
        shares = [float(macs(context.operators, allocator.left(each.widths)) / whole) for each in found]
        costs = [(1 + BACKWARD) * share / dense_step for share in shares]
        count, self.half = race_length(SHARE * steps, costs, self.shared)
        self.entrants = [self._entrant(each, cost) for each, cost in zip(found[:count], costs[:count], strict=True)]
        self.all = list(self.entrants)
        self.steps, self.spent = 0, 0.0

    def _entrant(self, allocation: Allocation, cost: float) -> Entrant:
        network = thin(self.search.model.network, self.context.groups, allocation.structure)
        model = Prompted(copy.deepcopy(self.search.model.stage), network).train()
        how = place(model, self.device)
        groups = parameter_groups(model, self.settings.weight_decay)
        optimiser = torch.optim.SGD(groups, lr=0.0, momentum=self.settings.momentum, nesterov=True)
        blocks = blocks_of(allocation, removable(self.search.allocator))
        return Entrant(allocation, blocks, cost, model, optimiser, how)

    def run(self, after: Callable[[], None]) -> None:
        """Trains, gives up the worse half, trains on and puts the winner first.

        Args:
            after: Called after each step.
        """
        data, train, total = self.context.data, self.settings, 2 * self.half if self.entrants else 0
        for step, images, labels in training_batches(data, train.batch, train.seed, total, self.steps):
            if step == self.half:
                self.entrants = sorted(self.entrants, key=Entrant.judged)[: halves(len(self.all))[1]]
            with autocast(self.device):
                target = (
                    None if self.teacher is None else self.teacher(images.to(self.device, memory_format=self.layout))
                )
            for entrant in self.entrants:
                self._train(entrant, step, images, labels.to(self.device), target)
            self.spent += self.shared + sum(entrant.cost for entrant in self.entrants)
            self.steps = step + 1
            finite(torch.tensor(min(entrant.losses[-1] for entrant in self.entrants)), step, GENTLY * train.lr)
            after()
        self.entrants.sort(key=Entrant.judged)

    def _train(self, entrant: Entrant, step: int, images: Tensor, labels: Tensor, target: Tensor | None) -> None:
        for group in entrant.optimiser.param_groups:
            group["lr"] = GENTLY * self.settings.lr * min(1.0, (step + 1) / WARM_UP)
        torch.manual_seed(step)  # what drops out is the same for all
        with autocast(self.device):
            logits = entrant.model(images.to(self.device, memory_format=entrant.layout))
        loss = task_loss(self.task, logits, labels, target, self.settings)
        entrant.losses.append(float(loss.detach()) if loss.isfinite() else math.inf)
        if not loss.isfinite():  # it loses; only where all do is it the rate's fault
            return
        entrant.optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(entrant.model.parameters(), LARGEST_GRADIENT)
        entrant.optimiser.step()

    def told(self) -> str:
        """What came of it, the winner first."""
        beaten = sorted((each for each in self.all if each not in self.entrants), key=Entrant.judged)
        return "training loss " + ", ".join(entrant.told() for entrant in (*self.entrants, *beaten))

    def carry_over(self) -> None:
        """Puts the winner's weights and prompt into the search's model."""
        model, winner = self.search.model, self.entrants[0]
        state = put_back(model.network, self.context.groups, winner.allocation.structure, winner.model.network)
        model.network.load_state_dict(state)
        model.stage.load_state_dict(winner.model.stage.state_dict())

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        left = [
            {"model": each.model.state_dict(), "optimiser": each.optimiser.state_dict()}
            if each in self.entrants
            else {}
            for each in self.all
        ]
        losses = [each.losses for each in self.all]
        return {"steps": self.steps, "spent": self.spent, "losses": losses, "left": left}

    def resume(self, state: dict[str, Any]) -> None:
        """Goes on from what `state` gave."""
        self.steps, self.spent = state["steps"], state["spent"]
        for each, losses, training in zip(self.all, state["losses"], state["left"], strict=True):
            each.losses = losses
            if training:
                each.model.load_state_dict(training["model"])
                each.optimiser.load_state_dict(training["optimiser"])
        self.entrants = [each for each, training in zip(self.all, state["left"], strict=True) if training]
