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

from passdeploy.feeding import training_batches
from passdeploy.groups import macs
from passdeploy.placing import ease_norms, place
from passdeploy.restoring import restore
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
    training_device,
)

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
    """A set of blocks, and what became of it.

    Attributes:
        allocation: Its best widths.
        blocks: Per depth group, whether it stays.
        cost: What a step takes, in steps of the dense network.
        losses: Of its steps.
    """

    allocation: Allocation
    blocks: dict[str, bool]
    cost: float
    losses: list[float] = field(default_factory=list)

    def judged(self) -> float:
        """The mean loss in the later half of its steps."""
        late = self.losses[len(self.losses) // 2 :]
        return sum(late) / max(1, len(late))

    def told(self) -> str:
        """Its blocks and its loss."""
        gone = ", ".join(name.removeprefix("depth:") for name, stays in self.blocks.items() if not stays)
        return f"without {gone or 'none'} {self.judged():.3f} ({len(self.losses)} steps)"


@dataclass(frozen=True)
class Training:
    """What an entrant has that is still in the race.

    Attributes:
        model: The thin network.
        optimiser: Of its weights and prompt.
        layout: How its images lie in memory.
    """

    model: Prompted
    optimiser: torch.optim.Optimizer
    layout: torch.memory_format


class Race:
    """Trains sets of blocks against each other, for one budget.

    Args:
        context: Of the search.
        search: What is trained in it; its weights are still the dense network's, and stay so.
        teacher: None without distillation.
        settings: Of the search's training.
        ratio: Asked share of the dense latency.
        steps: That it may take.

    Attributes:
        entrants: Those that are left, the best first once it is over; none where nothing is to be decided.
        training: Of those.
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
        self.layout = place(search.model, self.device, context.data.input_shape)
        allocator, config = search.allocator, context.config.search
        wanted = config.trials > 1 and config.co_adapt and ratio < 1
        target_ms = ratio * allocator.dense_ms
        forward, whole = 0.0 if teacher is None else 1.0, macs(context.operators)
        dense_step = forward + 1 + BACKWARD
        self.shared = forward / dense_step

        def cost(allocation: Allocation) -> float:
            left = macs(context.operators, allocator.left(allocation.widths))
            return (1 + BACKWARD) * float(left / whole) / dense_step

        found = alternatives(allocator, search.start(), target_ms, 1) if wanted else []
        if found and any(race_length(steps, 2 * [cost(found[0])], self.shared)):  # all are solved for a race only
            found = alternatives(allocator, search.start(), target_ms, config.trials)
        costs = [cost(each) for each in found]
        count, self.half = race_length(steps, costs, self.shared)
        removable_names = removable(allocator)
        self.entrants = [
            Entrant(each, blocks_of(each, removable_names), taken)
            for each, taken in zip(found[:count], costs[:count], strict=True)
        ]
        self.all = list(self.entrants)
        self.training = {entrant: self._begin(entrant.allocation) for entrant in self.entrants}
        self.steps, self.spent = 0, 0.0

    def _begin(self, allocation: Allocation) -> Training:
        network = thin(self.search.model.network, self.context.groups, allocation.structure)
        model = Prompted(copy.deepcopy(self.search.model.stage), network).train()
        how = place(model, self.device, self.context.data.input_shape)
        ease_norms(model)
        groups = parameter_groups(model, self.settings.weight_decay)
        optimiser = torch.optim.SGD(groups, lr=0.0, momentum=self.settings.momentum, nesterov=True)
        return Training(model, optimiser, how)

    def run(self, after: Callable[[], None]) -> None:
        """Trains, gives up the worse half, trains on and puts the winner first.

        Args:
            after: Called after each step.
        """
        data, train, total = self.context.data, self.settings, 2 * self.half if self.entrants else 0
        for step, images, labels in training_batches(data, train.batch, train.seed, total, self.steps):
            if step == self.half:
                self.entrants = sorted(self.entrants, key=Entrant.judged)[: halves(len(self.all))[1]]
                self.training = {entrant: self.training[entrant] for entrant in self.entrants}
            images, labels = images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
            with autocast(self.device):
                target = None if self.teacher is None else self.teacher(images.to(memory_format=self.layout))
            for entrant in self.entrants:
                self._train(entrant, step, images, labels, target)
            self.spent += self.shared + sum(entrant.cost for entrant in self.entrants)
            self.steps = step + 1
            finite(torch.tensor(min(entrant.losses[-1] for entrant in self.entrants)), step, train.lr)
            after()
        self.entrants.sort(key=Entrant.judged)

    def _train(self, entrant: Entrant, step: int, images: Tensor, labels: Tensor, target: Tensor | None) -> None:
        training = self.training[entrant]
        for group in training.optimiser.param_groups:
            group["lr"] = GENTLY * self.settings.lr * min(1.0, (step + 1) / WARM_UP)
        torch.manual_seed(step)  # what drops out is the same for all
        with autocast(self.device):
            logits = training.model(images.to(memory_format=training.layout))
        loss = task_loss(self.task, logits, labels, target, self.settings)
        entrant.losses.append(float(loss.detach()) if loss.isfinite() else math.inf)
        if not loss.isfinite():  # it loses; only where all do is it the rate's fault
            return
        loss.backward()
        nn.utils.clip_grad_norm_(training.model.parameters(), LARGEST_GRADIENT)
        training.optimiser.step()
        training.optimiser.zero_grad()  # here, so that only one entrant's gradients are there at a time

    def told(self) -> str:
        """What came of it, the winner first."""
        beaten = sorted((each for each in self.all if each not in self.entrants), key=Entrant.judged)
        return "training loss " + ", ".join(entrant.told() for entrant in (*self.entrants, *beaten))

    def carry_over(self) -> None:
        """Puts the winner's weights and prompt into the search's model."""
        model, winner = self.search.model, self.entrants[0]
        trained = self.training[winner].model
        state = put_back(model.network, self.context.groups, winner.allocation.structure, trained.network)
        restore(model.network, state)
        model.stage.load_state_dict(trained.stage.state_dict())

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        training = [self.training.get(each) for each in self.all]
        left = [{"model": t.model.state_dict(), "optimiser": t.optimiser.state_dict()} if t else {} for t in training]
        losses = [each.losses for each in self.all]
        return {"steps": self.steps, "spent": self.spent, "losses": losses, "left": left, "sets": self._sets()}

    def _sets(self) -> list[str]:
        return [each.allocation.structure.digest() for each in self.all]

    def resume(self, state: dict[str, Any]) -> None:
        """Goes on from what `state` gave; begins anew where other sets were tried.

        They may be others on another machine, where sensitivities are measured to other last digits.
        """
        if state.get("sets") != self._sets():
            return
        self.steps, self.spent = state["steps"], state["spent"]
        for each, losses, saved in zip(self.all, state["losses"], state["left"], strict=True):
            each.losses = losses
            if saved:
                self.training[each].model.load_state_dict(saved["model"])
                self.training[each].optimiser.load_state_dict(saved["optimiser"])
        self.entrants = [each for each, saved in zip(self.all, state["left"], strict=True) if saved]
        self.training = {entrant: self.training[entrant] for entrant in self.entrants}
