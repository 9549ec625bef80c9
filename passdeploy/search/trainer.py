"""PASS: the prompt, the hypernetwork and (ours) the weights are trained jointly under the latency budget.

Each step trains the masked network. The masks are those of the allocation that the current scores give under the
current budget, which tightens over the search and is solved again every few steps.

Scores are losses: what removing a unit costs. Every few steps a few groups are made a little narrower on the same
batch (ours), and the hypernetwork learns to predict by how much that changes the loss, under the masks and with
the weights as they are by then; what the search started from was measured one group at a time in the dense network. The
paper's gradient, straight through the binarisation, can be had instead (``search.signal: gradient``). It says little
once weights train along: batch norm makes the loss indifferent to the scale of what is kept, so that the gradients of
a group's kept units sum to nothing, while those of removed ones always ask to come back.

With `search.trials`, which blocks go is decided before, by trial (`race.py`): the training of the set that wins is
how the search begins. On a CPU, steps that train weights and prompt only cost what the thin network costs
(`forward.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from passdeploy.config import SearchConfig
from passdeploy.feeding import training_batches
from passdeploy.placing import place
from passdeploy.search.forward import Forward
from passdeploy.search.hypernetwork import Cuts
from passdeploy.search.method import SearchContext, SearchResult, register_method, search_steps
from passdeploy.search.prompt import InputStage, Prompted
from passdeploy.search.state import Consequences, health, prepare, widths_of
from passdeploy.search.trials import Trials
from passdeploy.tasks import task_of
from passdeploy.teacher import Teacher
from passdeploy.training import (
    TrainSettings,
    autocast,
    clip_gradients,
    finite,
    parameter_groups,
    task_loss,
    training_device,
)

CURVE_EVERY = 25
FROM_SCRATCH_EVERY = 4
"""Solutions of the allocation of which one starts from the dense network; the others start from the one before."""
STALE = 0.9
"""An allocation was for another budget when less than this share of what it was asked for is asked by now."""
WARM_UP = 0.1
"""Share of the steps over which the weights' rate rises."""


def ramped(ratio: float, progress: float, ramp: float) -> float:
    """The share of the dense latency asked for at a point of the search: from 1 down to `ratio`, fast at first."""
    if ramp <= 0 or progress >= ramp:
        return ratio
    return ratio + (1 - ratio) * (1 - progress / ramp) ** 3


def train_settings(settings: SearchConfig, context: SearchContext) -> TrainSettings:
    """How a search trains weights."""
    return TrainSettings(
        epochs=settings.epochs,
        batch=context.config.train_batch,
        lr=settings.lr,
        weight_decay=context.config.finetune.weight_decay,
        distill=settings.distill,
        seed=context.config.seed + 1,
    )


@register_method("pass")
def search_pass(context: SearchContext) -> SearchResult:
    """PASS as we ship it; `context.config.search` switches its parts."""
    training = _Training(context)
    start, train, trials = training.begin(), training.train, training.trials
    for step, images, labels in training_batches(context.data, train.batch, train.seed, trials.end, start):
        turn = _Turn(step, *divmod(step, len(context.ratios)))  # budgets take turns
        asked = training.allocate(turn)
        training.step(turn, asked, images, labels)
        training.record(turn, asked)
        if context.checkpoint.due():
            context.checkpoint.save(training.state(step + 1))
        context.progress(trials.spent + step + 1, training.total - trials.unspent, training.said(turn, asked))
    return training.result()


def _rate(step: int, total: int, settings: SearchConfig) -> float:
    """Warm-up, then the peak: search and fine-tuning are one schedule, whose cosine is fine-tuning's."""
    return settings.lr * min(1.0, (step + 1) / max(1, round(WARM_UP * total)))


@dataclass(frozen=True)
class _Turn:
    """A step of the search: the `number`-th of the budget `which`."""

    step: int
    number: int
    which: int


@dataclass(frozen=True)
class _Batch:
    """What a step trains on; `seed` is of what drops out in it."""

    images: Tensor
    labels: Tensor
    target: Tensor | None
    seed: int


@dataclass
class _Sums:
    """Running sums between two points of the curves."""

    loss: float = 0.0
    right: float = 0.0
    seen: int = 0
    steps: int = 0
    moved: int = 0
    prompt_grad: float = 0.0

    def add(self, loss: float, right: float, count: int) -> None:
        self.loss += loss * count
        self.right += right
        self.seen += count
        self.steps += 1


class _Training:
    """A search between two steps: what is trained, the allocations it trains under, and what is told of it."""

    def __init__(self, context: SearchContext) -> None:
        self.context, self.settings = context, context.config.search
        self.search = prepare(context)
        self.device, self.task = training_device(), task_of(context.data)
        model, hyper = self.search.model, self.search.hyper
        self.layout = place(model.train(), self.device, context.data.input_shape)
        dense = Prompted(InputStage(context.data.preprocess), context.network)
        self.teacher = Teacher(dense, self.device, context.data.input_shape) if self.settings.distill else None
        if not self.settings.co_adapt:
            model.network.requires_grad_(False)
        self.train, self.total = train_settings(self.settings, context), search_steps(context)
        self.weights = torch.optim.SGD(
            parameter_groups(model.network, self.train.weight_decay), lr=0.0, momentum=0.9, nesterov=True
        )
        slow = [{"params": list(hyper.parameters()), "lr": self.settings.hyper_lr}]
        if model.stage.prompt is not None:
            slow.append({"params": [model.stage.prompt], "lr": context.config.prompt.lr})
        self.adam = torch.optim.Adam(slow)
        self.trains_more = self.settings.co_adapt or model.stage.prompt is not None
        self.forward = Forward(model, context.groups, self.layout)
        self.cuts = [self.search.open() for _ in context.ratios]
        self.solved = [1.0 for _ in context.ratios]  # the share that each budget's allocation was asked for
        self.consequences = [Consequences() for _ in context.ratios]
        self.curves: dict[str, list[float]] = {}
        self.sums = [_Sums() for _ in context.ratios]
        self.trials = Trials(context, self.search, self.teacher, self.train, self.total)

    def begin(self) -> int:
        """Takes up a checkpoint, if there is one, and decides by trial which blocks go; returns the first step left."""
        saved = self.context.checkpoint.load()
        if saved is not None and "trials" not in saved:  # of a version without trials: begin again
            saved = None
        if saved is not None and saved["step"]:
            self._take(saved)
            return int(saved["step"])
        won = self.trials.decide(None if saved is None else saved["trials"])
        if won is not None:
            self.cuts[0] = self.search.cuts_of(won.allocation, self.search.start())
            self.solved[0] = self.context.ratios[0]
        return self.trials.start

    def allocate(self, turn: _Turn) -> float:
        """Solves a budget's allocation again when it is time to; returns the share of the dense latency asked for."""
        which, settings, final = turn.which, self.settings, self.context.ratios[turn.which]
        asked = ramped(final, turn.step / self.trials.end, 0.0 if self.trials.start else settings.ramp)
        solution, within = divmod(turn.number, settings.resolve_every)
        tighter = asked < STALE * self.solved[which] or asked == final != self.solved[which]
        if within == 0 or tighter:
            before, self.solved[which] = self.cuts[which].hard, asked
            scratch = within == 0 and solution % FROM_SCRATCH_EVERY == 0
            self.cuts[which] = self.search.cuts(self.cuts[which], asked, scratch, self.trials.blocks(which))
            after = self.cuts[which].hard
            self.sums[which].moved += sum(int((a != b).sum()) for a, b in zip(before, after, strict=True))
        return asked

    def step(self, turn: _Turn, asked: float, images: Tensor, labels: Tensor) -> None:
        """Trains weights and prompt under a budget's masks and, every few turns, the hypernetwork."""
        which, settings, model = turn.which, self.settings, self.search.model
        # Without weights or a prompt to train there is nothing else to be done in a step.
        learn = turn.number % settings.hyper_every == 0 or not self.trains_more
        for group in self.weights.param_groups:
            group["lr"] = _rate(turn.step, self.trials.end, settings)
        images = images.to(self.device, memory_format=self.layout, non_blocking=True)
        labels = labels.to(self.device, non_blocking=True)
        with autocast(self.device):
            target = None if self.teacher is None else self.teacher(images)
        batch = _Batch(images, labels, target, seed=self._seed(turn) * 2 + 7)
        if learn:
            loss, objective, logits = self._learning(turn, asked, batch)
        else:
            torch.manual_seed(batch.seed)
            with autocast(self.device):
                logits = self.forward.kept(self.cuts[which].hard, images, which)
            loss = objective = task_loss(self.task, logits, labels, target, self.train)
        self.weights.zero_grad()
        self.adam.zero_grad()
        if objective.requires_grad:  # a probe may have found nothing to remove, and nothing else be trained
            objective.backward()
        value = finite(loss, turn.step, settings.lr)
        prompt = model.stage.prompt
        if prompt is not None and prompt.grad is not None:
            rate = self.context.config.prompt.lr
            norm = finite(prompt.grad.norm(), turn.step, rate, "the norm of the prompt's gradient")
            self.sums[which].prompt_grad += norm
        if learn:
            nn.utils.clip_grad_norm_(self.search.hyper.parameters(), 1.0)
        if settings.co_adapt:
            clip_gradients(model.network, turn.step, settings.lr)
            self.weights.step()
        self.adam.step()
        hits, places = self.task.right(logits, labels)
        self.sums[which].add(value, hits / max(1, places) * len(labels), len(labels))

    def _learning(self, turn: _Turn, asked: float, batch: _Batch) -> tuple[Tensor, Tensor, Tensor]:
        """The loss under the masks, the same with what the hypernetwork minimises, and the logits."""
        which, settings, search = turn.which, self.settings, self.search
        cuts = self.cuts[which]
        scores, straight = search.hyper(search.prompt(), search.statistics, search.prior, cuts, asked)
        values = straight if settings.signal == "gradient" else cuts.hard
        loss, logits = self._under(values, batch)
        if settings.signal == "measured":
            probe = search.probe(cuts, scores, torch.Generator().manual_seed(self._seed(turn)))
            if probe is None:
                return loss, loss, logits
            with torch.no_grad():
                changed = float(self._under(probe.hard, batch)[0] - loss)
            if not math.isfinite(changed):  # it would stay in the running sums
                return loss, loss, logits
            return loss, loss + self.consequences[which].error(probe.predicted(scores), changed), logits
        predictor = self.context.predictor
        if not settings.latency_weight or not hasattr(predictor, "predict_soft"):
            return loss, loss, logits
        expected = predictor.predict_soft(torch.stack([value.sum() for value in values]))
        return loss, loss + settings.latency_weight * expected / search.allocator.dense_ms, logits

    def _under(self, values: Sequence[Tensor], batch: _Batch) -> tuple[Tensor, Tensor]:
        """The loss under masks, and the logits."""
        torch.manual_seed(batch.seed)  # what drops out is the same each time: what differs is the masks'
        with autocast(self.device):
            logits = self.forward.masked(values, batch.images)
        return task_loss(self.task, logits, batch.labels, batch.target, self.train), logits

    def _seed(self, turn: _Turn) -> int:
        return self.context.config.seed * 1_000_003 + turn.step

    def record(self, turn: _Turn, asked: float) -> None:
        """Adds a point to the curves when it is time to."""
        budgets, which = len(self.context.ratios), turn.which
        every = max(1, CURVE_EVERY // budgets)  # turns; the shorter training of each budget shows, too
        if (turn.number + 1) % every and turn.step + budgets < self.trials.end:
            return
        sums, allocator = self.sums[which], self.search.allocator
        widths = widths_of(self.cuts[which])[None]
        point = {
            "step": self.trials.spent + turn.step + 1,
            "budget": which,
            "loss": round(sums.loss / max(1, sums.seen), 5),
            "accuracy": round(sums.right / max(1, sums.seen), 5),
            "latency_ratio": round(float(allocator.predict(widths)[0]) / allocator.dense_ms, 5),
            "asked_ratio": round(asked, 5),
            "blocks": int(widths[0][allocator.depth].sum()),
            "moved": sums.moved,
            "prompt_grad": round(sums.prompt_grad / max(1, sums.steps), 6),
        }
        for key, value in point.items():
            self.curves.setdefault(key, []).append(value)
        self.sums[which] = _Sums()

    def said(self, turn: _Turn, asked: float) -> str:
        """A line about the state: of the budget whose turn it is."""
        pairs = zip(self.curves.get("loss", []), self.curves.get("budget", []), strict=True)
        own = [loss for loss, budget in pairs if budget == turn.which]
        return f"loss {own[-1]:.3f}, {1 / asked:.2f}x" if own else ""

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint holds before a step that is not the first."""
        return {
            "step": step,
            "trials": self.trials.state(),
            "model": self.search.model.state_dict(),
            "hyper": self.search.hyper.state_dict(),
            "weights": self.weights.state_dict(),
            "adam": self.adam.state_dict(),
            "curves": self.curves,
            "sums": [vars(each) for each in self.sums],
            "cuts": [{"thresholds": c.thresholds, "hard": list(c.hard)} for c in self.cuts],
            "solved": self.solved,
            "consequences": [vars(each) for each in self.consequences],
        }

    def _take(self, state: dict[str, Any]) -> None:
        """Goes on from what `state` gave."""
        self.trials.resume(state["trials"])
        self.search.model.load_state_dict(state["model"])
        self.search.hyper.load_state_dict(state["hyper"])
        self.weights.load_state_dict(state["weights"])
        self.adam.load_state_dict(state["adam"])
        self.curves, self.solved = state["curves"], state["solved"]
        self.sums = [_Sums(**entry) for entry in state["sums"]]
        self.cuts = [Cuts(entry["thresholds"], tuple(entry["hard"])) for entry in state["cuts"]]
        self.consequences = [Consequences(**entry) for entry in state["consequences"]]

    def result(self) -> SearchResult:
        """What was found, each budget's scores at what it asks for in the end."""
        search, model = self.search, self.search.model
        importance = [
            search.scores(search.cuts(cut, asked, blocks=self.trials.blocks(which)), asked)
            for which, (cut, asked) in enumerate(zip(self.cuts, self.context.ratios, strict=True))
        ]
        return SearchResult(
            importance=[
                {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in each.items()}
                for each in importance
            ],
            allocator=self.settings.allocator,
            network={name: value.detach().cpu() for name, value in model.network.state_dict().items()},
            stage={name: value.detach().cpu() for name, value in model.stage.state_dict().items()},
            extra=dict(search.hyper.state_dict()),
            depth=self.settings.depth,
            adapted=self.settings.co_adapt,
            unspent_steps=self.trials.unspent,
            curves=self.curves,
            blocks=[self.trials.blocks(which) for which in range(len(self.context.ratios))],
            health=[*health(self.curves, search, self.cuts, importance, self.trials.blocks), *self.trials.health()],
        )
