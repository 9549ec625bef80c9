"""PASS: the prompt, the hypernetwork and (ours) the weights are trained jointly under the latency budget.

Each step trains the masked network. The masks are those of the allocation that the current scores give under the
current budget, which tightens over the search and is solved again every few steps.

Scores are losses: what removing a unit costs. Every few steps a few groups are made a little narrower on the same
batch (ours), and the hypernetwork learns to predict by how much that changes the loss, under the masks and with
the weights as they are by then; what the search started from was measured one group at a time in the dense network. The
paper's gradient, straight through the binarisation, can be had instead (``search.signal: gradient``). It says little
once weights train along: batch norm makes the loss indifferent to the scale of what is kept, so that the gradients of
a group's kept units sum to nothing, while those of removed ones always ask to come back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from passdeploy.config import SearchConfig
from passdeploy.kernels.masked_forward import search_masker
from passdeploy.placing import place
from passdeploy.search.hypernetwork import Cuts
from passdeploy.search.method import SearchContext, SearchResult, register_method, search_steps
from passdeploy.search.prompt import InputStage, Prompted
from passdeploy.search.state import Consequences, State, health, prepare, widths_of
from passdeploy.tasks import task_of
from passdeploy.teacher import Teacher
from passdeploy.training import (
    LARGEST_GRADIENT,
    TrainSettings,
    autocast_dtype,
    finite,
    parameter_groups,
    task_loss,
    training_batches,
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


def _train_settings(settings: SearchConfig, context: SearchContext) -> TrainSettings:
    return TrainSettings(
        epochs=settings.epochs,
        batch=context.config.train_batch,
        lr=settings.lr,
        weight_decay=context.config.finetune.weight_decay,
        distill=settings.distill,
        seed=context.config.seed + 1,
    )


def _freeze_weights(network: nn.Module) -> None:
    for parameter in network.parameters():
        parameter.requires_grad_(False)


@register_method("pass")
def search_pass(context: SearchContext) -> SearchResult:
    """PASS as we ship it; `context.config.search` switches its parts."""
    search = prepare(context)
    settings, config = context.config.search, context.config
    device = training_device()
    model, hyper = search.model, search.hyper
    how = place(model.train(), device)
    dense = Prompted(InputStage(context.data.preprocess), context.network)
    teacher = Teacher(dense, device, context.data.input_shape) if settings.distill else None
    if not settings.co_adapt:
        _freeze_weights(model.network)
    train = _train_settings(settings, context)
    total = search_steps(context)
    weights = torch.optim.SGD(parameter_groups(model.network, train.weight_decay), lr=0.0, momentum=0.9, nesterov=True)
    slow = [{"params": list(hyper.parameters()), "lr": settings.hyper_lr}]
    if model.stage.prompt is not None:
        slow.append({"params": [model.stage.prompt], "lr": config.prompt.lr})
    adam = torch.optim.Adam(slow)
    masker = search_masker(model, context.groups, "network.")
    cuts = [search.open() for _ in context.ratios]
    solved = [1.0 for _ in context.ratios]  # the share that each budget's allocation was asked for
    consequences = [Consequences() for _ in context.ratios]
    curves: dict[str, list[float]] = {
        key: []
        for key in (
            "step",
            "budget",
            "loss",
            "accuracy",
            "latency_ratio",
            "asked_ratio",
            "blocks",
            "moved",
            "prompt_grad",
        )
    }
    recorded_every = max(1, CURVE_EVERY // len(context.ratios))  # turns; the shorter training of each budget shows, too
    start, sums = 0, [_Sums() for _ in context.ratios]
    state = context.checkpoint.load()
    if state is not None:
        model.load_state_dict(state["model"])
        hyper.load_state_dict(state["hyper"])
        weights.load_state_dict(state["weights"])
        adam.load_state_dict(state["adam"])
        start, curves, sums = state["step"], state["curves"], [_Sums(**entry) for entry in state["sums"]]
        cuts = [Cuts(entry["thresholds"], tuple(entry["hard"])) for entry in state["cuts"]]
        solved = state["solved"]
        consequences = [Consequences(**entry) for entry in state["consequences"]]
    dtype, task = autocast_dtype(device), task_of(context.data)
    trained = settings.co_adapt or model.stage.prompt is not None

    def under(values: Sequence[Tensor], batch: _Batch) -> tuple[Tensor, Tensor]:
        """The loss under masks, and the logits."""
        torch.manual_seed(batch.seed)  # what drops out is the same each time: what differs is the masks'
        with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            logits = masker(search.named([value.to(device) for value in values]), batch.images)
        return task_loss(task, logits, batch.labels, batch.target, train), logits

    for step, images, labels in training_batches(context.data, train.batch, train.seed, total, start):
        turn, which = divmod(step, len(context.ratios))  # budgets take turns
        asked = ramped(context.ratios[which], step / total, settings.ramp)
        solution, within = divmod(turn, settings.resolve_every)
        tighter = asked < STALE * solved[which] or asked == context.ratios[which] != solved[which]
        if within == 0 or tighter:
            before, solved[which] = cuts[which].hard, asked
            scratch = within == 0 and solution % FROM_SCRATCH_EVERY == 0
            cuts[which] = search.cuts(cuts[which], asked, scratch)
            sums[which].moved += sum(int((a != b).sum()) for a, b in zip(before, cuts[which].hard, strict=True))
        # Without weights or a prompt to train there is nothing else to be done in a step.
        learn = turn % settings.hyper_every == 0 or not trained
        values = list(cuts[which].hard)
        if learn:
            scores, straight = hyper(search.prompt(), search.statistics, search.prior, cuts[which], asked)
            values = straight if settings.signal == "gradient" else values
        for group in weights.param_groups:
            group["lr"] = _rate(step, total, settings)
        images, labels = images.to(device, memory_format=how), labels.to(device)
        with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            target = None if teacher is None else teacher(images)
        batch = _Batch(images, labels, target, seed=(config.seed * 1_000_003 + step) * 2 + 7)
        loss, logits = under(values, batch)
        objective = loss
        if learn and settings.signal == "measured":
            probe = search.probe(cuts[which], scores, torch.Generator().manual_seed(config.seed * 1_000_003 + step))
            if probe is not None:
                with torch.no_grad():
                    changed = float(under(probe.hard, batch)[0] - loss)
                objective = objective + consequences[which].error(probe.predicted(scores), changed)
        elif learn and settings.latency_weight and hasattr(context.predictor, "predict_soft"):
            expected = context.predictor.predict_soft(torch.stack([value.sum() for value in values]))
            objective = objective + settings.latency_weight * expected / search.allocator.dense_ms
        weights.zero_grad()
        adam.zero_grad()
        if objective.requires_grad:  # a probe may have found nothing to remove, and nothing else be trained
            objective.backward()
        if model.stage.prompt is not None and model.stage.prompt.grad is not None:
            sums[which].prompt_grad += float(model.stage.prompt.grad.norm())
        if learn:
            nn.utils.clip_grad_norm_(hyper.parameters(), 1.0)
        if settings.co_adapt:
            nn.utils.clip_grad_norm_(model.network.parameters(), LARGEST_GRADIENT)
            weights.step()
        adam.step()
        hits, places = task.right(logits, labels)
        sums[which].add(finite(loss, step, settings.lr), hits / max(1, places) * len(labels), len(labels))
        if (turn + 1) % recorded_every == 0 or step + len(context.ratios) >= total:
            _record(curves, step + 1, which, sums[which], asked, cuts[which], search)
            sums[which] = _Sums()
        if context.checkpoint.due():
            context.checkpoint.save(
                _state(step + 1, model, hyper, weights, adam, curves, sums, cuts, solved, consequences)
            )
        own = [loss for loss, budget in zip(curves["loss"], curves["budget"], strict=True) if budget == which]
        context.progress(step + 1, total, f"loss {own[-1]:.3f}, {1 / asked:.2f}x" if own else "")
    importance = [
        search.scores(search.cuts(cut, asked), asked) for cut, asked in zip(cuts, context.ratios, strict=True)
    ]
    return SearchResult(
        importance=[
            {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in each.items()}
            for each in importance
        ],
        allocator=settings.allocator,
        network={name: value.detach().cpu() for name, value in model.network.state_dict().items()},
        stage={name: value.detach().cpu() for name, value in model.stage.state_dict().items()},
        extra=dict(hyper.state_dict()),
        depth=settings.depth,
        adapted=settings.co_adapt,
        curves=curves,
        health=health(curves, search, cuts, importance),
    )


def _rate(step: int, total: int, settings: SearchConfig) -> float:
    """Warm-up, then the peak: search and fine-tuning are one schedule, whose cosine is fine-tuning's."""
    return settings.lr * min(1.0, (step + 1) / max(1, round(WARM_UP * total)))


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


def _record(
    curves: dict[str, list[float]], step: int, which: int, sums: _Sums, asked: float, cuts: Cuts, search: State
) -> None:
    widths = widths_of(cuts)[None]
    point = {
        "step": step,
        "budget": which,
        "loss": round(sums.loss / max(1, sums.seen), 5),
        "accuracy": round(sums.right / max(1, sums.seen), 5),
        "latency_ratio": round(float(search.allocator.predict(widths)[0]) / search.allocator.dense_ms, 5),
        "asked_ratio": round(asked, 5),
        "blocks": int(widths[0][search.allocator.depth].sum()),
        "moved": sums.moved,
        "prompt_grad": round(sums.prompt_grad / max(1, sums.steps), 6),
    }
    for key, value in point.items():
        curves[key].append(value)


def _state(
    step: int,
    model: nn.Module,
    hyper: nn.Module,
    weights: torch.optim.Optimizer,
    adam: torch.optim.Optimizer,
    curves: dict[str, list[float]],
    sums: list[_Sums],
    cuts: list[Cuts],
    solved: list[float],
    consequences: list[Consequences],
) -> dict[str, Any]:
    return {
        "step": step,
        "model": model.state_dict(),
        "hyper": hyper.state_dict(),
        "weights": weights.state_dict(),
        "adam": adam.state_dict(),
        "curves": curves,
        "sums": [vars(each) for each in sums],
        "cuts": [{"thresholds": c.thresholds, "hard": list(c.hard)} for c in cuts],
        "solved": solved,
        "consequences": [vars(each) for each in consequences],
    }
