"""What PASS trains, and how scores become the masks that it trains under."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from passdeploy.groups import Groups
from passdeploy.search.allocator import Allocation, Allocator, Importance
from passdeploy.search.hypernetwork import Cuts, HyperNetwork
from passdeploy.search.method import SearchContext
from passdeploy.search.prompt import InputStage, Prompted
from passdeploy.search.sensitivity import measure
from passdeploy.search.statistics import Statistics, collect


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
class State:
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


def prepare(context: SearchContext) -> State:
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
    return State(context, allocator, model, hyper, statistics, prior, unit_savings(allocator))


def health(curves: dict[str, list[float]], search: State, cuts: list[Cuts]) -> list[dict[str, Any]]:
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
