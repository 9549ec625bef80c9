"""PASS: the prompt, the hypernetwork and (ours) the weights are trained jointly under the latency budget.

Each step trains the masked network. The masks are those of the allocation that the current scores give under the
current budget, which tightens over the search and is solved again every few steps; gradients reach the scores, and
through them the LSTM and the prompt, straight through the binarisation.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from passdeploy.config import SearchConfig
from passdeploy.groups import Groups
from passdeploy.kernels.masked_forward import search_masker
from passdeploy.search.allocator import Allocation, Allocator, Importance
from passdeploy.search.hypernetwork import Cuts, HyperNetwork
from passdeploy.search.method import SearchContext, SearchResult, register_method, search_steps
from passdeploy.search.prompt import InputStage, Prompted
from passdeploy.search.sensitivity import measure
from passdeploy.search.statistics import Statistics, collect
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


class SoftPredictor(Protocol):
    """A latency model that torch can differentiate."""

    def predict_soft(self, widths: Tensor) -> Tensor:
        """Maps (groups,) kept units to milliseconds."""
        ...


def ramped(ratio: float, progress: float, ramp: float) -> float:
    """The share of the dense latency asked for at a point of the search: from 1 down to `ratio`, fast at first."""
    if ramp <= 0 or progress >= ramp:
        return ratio
    return ratio + (1 - ratio) * (1 - progress / ramp) ** 3


def cuts_of(
    allocation: Allocation, scores: Importance, groups: Groups, saved_ms: np.ndarray, temperature: float
) -> Cuts:
    """Thresholds at which the allocator would have decided otherwise.

    In a group that is partly kept: half way between its lowest kept and highest removed score. In a group kept or
    removed as a whole: where its loss per millisecond would meet the allocation's price.

    Args:
        allocation: The current one.
        scores: Importances it was made from.
        groups: Of the network.
        saved_ms: (groups,), milliseconds that removing one unit saves.
        temperature: Thresholds stay at least this far from a group that is decided as a whole.
    """
    thresholds, hard = [], []
    for g, group in enumerate(groups.groups):
        log = np.log(np.asarray(scores[group.name]))
        kept = np.array(allocation.structure.masks[group.name])
        if kept.any() and not kept.all():
            threshold = (log[kept].min() + log[~kept].max()) / 2
        else:
            price = np.log(max(allocation.price * max(saved_ms[g], 0.0), 1e-12))
            threshold = min(price, log.min() - temperature) if kept.all() else max(price, log.max() + temperature)
            # Far away the sigmoid has no slope left; keep the decision within reach.
            threshold = float(np.clip(threshold, log.min() - 4 * temperature, log.max() + 4 * temperature))
        thresholds.append(threshold)
        hard.append(torch.tensor(kept, dtype=torch.float32))
    return Cuts(torch.tensor(thresholds, dtype=torch.float32), tuple(hard))


def widths_of(cuts: Cuts) -> np.ndarray:
    """(groups,), units that stay."""
    return np.array([int(mask.sum()) for mask in cuts.hard])


def unit_savings(allocator: Allocator) -> np.ndarray:
    """(groups,), milliseconds per unit that go when a group falls from dense to its lowest width."""
    rows = np.repeat(allocator.full[None], len(allocator.grids), axis=0)
    for g, grid in enumerate(allocator.grids):
        rows[g, g] = grid[0]
    removed = np.maximum(allocator.full - np.array([grid[0] for grid in allocator.grids]), 1)
    return (allocator.dense_ms - allocator.predict(rows)) / removed


@dataclass
class _Search:
    """The parts that are trained, and the allocation that the masks follow."""

    context: SearchContext
    allocator: Allocator
    model: Prompted
    hyper: HyperNetwork
    statistics: Statistics
    prior: list[Tensor]
    savings: np.ndarray

    def prompt(self) -> Tensor:
        pixels = self.model.stage.pixels()
        return torch.zeros(self.context.data.input_shape) if pixels is None else pixels.cpu()

    def named(self, values: list[Tensor]) -> dict[str, Tensor]:
        return dict(zip(self.context.groups.names, values, strict=True))

    @torch.no_grad()
    def scores(self, cuts: Cuts, ratio: float) -> Importance:
        values, _ = self.hyper(self.prompt(), self.statistics, self.prior, cuts, ratio)
        return {name: value.double().exp().numpy() for name, value in self.named(values).items()}

    def solve(self, scores: Importance, ratio: float, start: np.ndarray | None = None) -> Allocation:
        """The allocation for a share of the dense latency; the fastest there is when that share can't be reached.

        Args:
            scores: Importances.
            ratio: The share.
            start: Widths of a solution under similar scores: several times faster than from scratch.
        """
        target_ms, allocation = ratio * self.allocator.dense_ms, None
        if start is not None:
            allocation = self.allocator.narrow(scores, target_ms, start, blocks=True)
        if allocation is None:
            allocation = self.allocator.solve(scores, target_ms)
        if allocation is None:
            widths = self.allocator.fastest()
            predicted = float(self.allocator.predict(widths[None])[0])
            allocation = Allocation(self.allocator.structure(scores, widths), widths, predicted, 1.0)
        return allocation

    def cuts(self, previous: Cuts, ratio: float, scratch: bool = True) -> Cuts:
        """The cuts of the current scores' allocation, which starts from the previous one's unless from `scratch`."""
        scores = self.scores(previous, ratio)
        allocation = self.solve(scores, ratio, None if scratch else widths_of(previous))
        return cuts_of(allocation, scores, self.context.groups, self.savings, self.hyper.temperature)

    def open(self) -> Cuts:
        """Everything kept."""
        base = torch.stack([p.min() for p in self.prior]) - self.hyper.temperature
        return Cuts(base, tuple(torch.ones_like(p) for p in self.prior))


def prepare(context: SearchContext) -> _Search:
    """Measures the prior, collects statistics and builds the hypernetwork."""
    settings, config = context.config.search, context.config
    torch.manual_seed(config.seed)
    network = copy.deepcopy(context.network)
    prompt = config.prompt
    model = Prompted(InputStage(context.data.preprocess, prompt.kind, prompt.width), network)
    allocator = context.allocator(settings.allocator)
    full = allocator.full
    rows = np.repeat(full[None], len(full), axis=0)
    for g, grid in enumerate(allocator.grids):
        rows[g, g] = grid[0]
    share = torch.tensor(1 - allocator.predict(rows) / allocator.dense_ms, dtype=torch.float32)
    flat = {group.name: torch.zeros(group.units) for group in context.groups.groups}
    statistics = collect(network, context.groups, flat, share)
    if settings.prior == "sensitivity":
        magnitude = dict(zip(context.groups.names, statistics.magnitude, strict=True))
        importance = measure(context, magnitude)
    else:
        importance = {name: torch.ones(units, dtype=torch.float64) for name, units in context.groups.units.items()}
    log_prior = {name: values.log().float() for name, values in importance.items()}
    statistics = collect(network, context.groups, log_prior, share)
    hyper = HyperNetwork(
        recurrence=settings.recurrence,
        statistics=settings.statistics,
        memory=settings.memory,
        temperature=settings.temperature,
        reach=3.0 if settings.prior == "sensitivity" else 0.0,
    )
    prior = [log_prior[name] for name in context.groups.names]
    return _Search(context, allocator, model, hyper, statistics, prior, unit_savings(allocator))


def _train_settings(settings: SearchConfig, context: SearchContext) -> TrainSettings:
    return TrainSettings(
        epochs=settings.epochs,
        batch=context.config.train_batch,
        lr=settings.lr,
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
    model.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
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
    curves: dict[str, list[float]] = {
        key: []
        for key in ("step", "loss", "accuracy", "latency_ratio", "asked_ratio", "blocks", "moved", "prompt_grad")
    }
    start, sums = 0, _Sums()
    state = context.checkpoint.load()
    if state is not None:
        model.load_state_dict(state["model"])
        hyper.load_state_dict(state["hyper"])
        weights.load_state_dict(state["weights"])
        adam.load_state_dict(state["adam"])
        start, curves, sums = state["step"], state["curves"], _Sums(**state["sums"])
        cuts = [Cuts(entry["thresholds"], tuple(entry["hard"])) for entry in state["cuts"]]
        solved = state["solved"]
    dtype, task = autocast_dtype(device), task_of(context.data)
    trained = settings.co_adapt or model.stage.prompt is not None
    for step, images, labels in training_batches(context.data, train.batch, train.seed, total, start):
        turn, which = divmod(step, len(context.ratios))  # budgets take turns
        asked = ramped(context.ratios[which], step / total, settings.ramp)
        solution, within = divmod(turn, settings.resolve_every)
        tighter = asked < STALE * solved[which] or asked == context.ratios[which] != solved[which]
        if within == 0 or tighter:
            before, solved[which] = cuts[which].hard, asked
            scratch = within == 0 and solution % FROM_SCRATCH_EVERY == 0
            cuts[which] = search.cuts(cuts[which], asked, scratch)
            sums.moved += sum(int((a != b).sum()) for a, b in zip(before, cuts[which].hard, strict=True))
        # Without weights or a prompt to train there is nothing else to be done in a step.
        learn = turn % settings.hyper_every == 0 or not trained
        if learn:
            _, values = hyper(search.prompt(), search.statistics, search.prior, cuts[which], asked)
        else:
            values = list(cuts[which].hard)
        masks = search.named([value.to(device) for value in values])
        for group in weights.param_groups:
            group["lr"] = _rate(step, total, settings)
        images = images.to(device, memory_format=torch.channels_last)
        labels = labels.to(device)
        with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            target = None if teacher is None else teacher(images)
            logits = masker(masks, images)
        loss = task_loss(task, logits, labels, target, train)
        objective = loss
        if learn and settings.latency_weight and hasattr(context.predictor, "predict_soft"):
            expected = context.predictor.predict_soft(torch.stack([value.sum() for value in values]))
            objective = objective + settings.latency_weight * expected / search.allocator.dense_ms
        weights.zero_grad()
        adam.zero_grad()
        objective.backward()
        if model.stage.prompt is not None and model.stage.prompt.grad is not None:
            sums.prompt_grad += float(model.stage.prompt.grad.norm())
        if learn:
            nn.utils.clip_grad_norm_(hyper.parameters(), 1.0)
        else:
            for parameter in hyper.parameters():
                parameter.grad = None  # Adam leaves them alone
        if settings.co_adapt:
            nn.utils.clip_grad_norm_(model.network.parameters(), LARGEST_GRADIENT)
            weights.step()
        adam.step()
        hits, places = task.right(logits, labels)
        sums.add(finite(loss, step, settings.lr), hits / max(1, places) * len(labels), len(labels))
        if (step + 1) % CURVE_EVERY == 0 or step + 1 == total:
            _record(curves, step + 1, sums, asked, cuts[which], search)
            sums = _Sums()
            if context.checkpoint.due():
                context.checkpoint.save(_state(step + 1, model, hyper, weights, adam, curves, sums, cuts, solved))
        state_line = f"loss {curves['loss'][-1]:.3f}, {1 / asked:.2f}x" if curves["loss"] else ""
        context.progress(step + 1, total, state_line)
    importance = []
    for which, ratio in enumerate(context.ratios):
        scores = search.scores(search.cuts(cuts[which], ratio), ratio)
        importance.append({name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in scores.items()})
    return SearchResult(
        importance=importance,
        allocator=settings.allocator,
        network={name: value.detach().cpu() for name, value in model.network.state_dict().items()},
        stage={name: value.detach().cpu() for name, value in model.stage.state_dict().items()},
        extra=dict(hyper.state_dict()),
        depth=settings.depth,
        adapted=settings.co_adapt,
        curves=curves,
        health=health(curves, search, cuts),
    )


def _rate(step: int, total: int, settings: SearchConfig) -> float:
    """Warm-up, then the peak: search and fine-tuning are one schedule, whose cosine is fine-tuning's."""
    return settings.lr * min(1.0, (step + 1) / max(1, round(WARM_UP * total)))


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


def _record(curves: dict[str, list[float]], step: int, sums: _Sums, asked: float, cuts: Cuts, search: _Search) -> None:
    widths = widths_of(cuts)[None]
    point = {
        "step": step,
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
    sums: _Sums,
    cuts: list[Cuts],
    solved: list[float],
) -> dict[str, Any]:
    return {
        "step": step,
        "model": model.state_dict(),
        "hyper": hyper.state_dict(),
        "weights": weights.state_dict(),
        "adam": adam.state_dict(),
        "curves": curves,
        "sums": vars(sums),
        "cuts": [{"thresholds": c.thresholds, "hard": list(c.hard)} for c in cuts],
        "solved": solved,
    }


def health(curves: dict[str, list[float]], search: _Search, cuts: list[Cuts]) -> list[dict[str, Any]]:
    """Checks a finished search: each is ``{"name", "ok", "message"}``."""
    checks = []
    loss = curves["loss"]
    best, last = min(loss), loss[-1]
    checks.append(
        (
            "loss settles",
            bool(np.isfinite(last)) and last <= 1.5 * best + 0.1,
            f"from {loss[0]:.3f} to {last:.3f}, lowest {best:.3f}",
        )
    )
    moved = sum(curves["moved"])
    checks.append(("masks move", moved > 0, f"{int(moved)} mask bits changed during the search"))
    if search.model.stage.prompt is not None:
        gradient = curves["prompt_grad"][-1]
        checks.append(("prompt learns", gradient > 1e-7, f"mean gradient norm at the end {gradient:.2g}"))
    groups, alive = search.context.groups.groups, None
    widths = widths_of(cuts[0])[None]
    alive = search.allocator.alive(widths)[0]
    collapsed = [
        group.name
        for g, group in enumerate(groups)
        if group.kind == "channel" and alive[g] and widths[0, g] < 0.06 * group.units
    ]
    checks.append(
        ("no group collapsed", not collapsed, ", ".join(collapsed) or "all groups keep at least 6 % of their units")
    )
    return [{"name": name, "ok": bool(ok), "message": message} for name, ok, message in checks]
