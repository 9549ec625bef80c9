"""What PASS trains, and how scores become the masks that it trains under."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

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


Value = TypeVar("Value")

WIDEST = 700.0
"""Log importances lie within plus and minus this: what exponentiates to a number that is neither 0 nor infinite."""
LEAST_SPREAD = 0.01
"""Standard deviation of the log scores' corrections below which a hypernetwork has learnt nothing."""
MOST_AT_BOUND = 0.5
"""Share of the corrections that may lie at their bounds, where nothing more can be learnt."""
PROBED = 4
"""Groups that a probe changes: several, since each measurement of the loss is then one of all of them."""


@dataclass(frozen=True)
class Probe:
    """A small change of the masks, whose effect on the loss is measured.

    Attributes:
        hard: Per group (units,), the changed masks.
        removed: (all units,), 1 for a unit that the change removes, -1 for one that it brings back.
    """

    hard: tuple[Tensor, ...]
    removed: Tensor

    def predicted(self, scores: list[Tensor]) -> Tensor:
        """The loss that the change costs if the scores, per group (units,), are right: a scalar."""
        return (self.removed * torch.cat(scores).exp()).sum()


@dataclass
class Consequences:
    """How the changes of the loss that scores predict compare with those that are measured.

    Scores are right up to a common factor, which decides nothing: it is fitted to what was measured last.

    Attributes:
        product: Running sum of predicted times measured changes.
        square: Running sum of the predicted ones' squares.
        size: Running sum of the measured ones' sizes.
        weight: Running sum of ones.
    """

    product: float = 0.0
    square: float = 0.0
    size: float = 0.0
    weight: float = 0.0

    KEPT = 0.95
    """What is left of the sums at the next probe."""

    def error(self, predicted: Tensor, measured: float) -> Tensor:
        """What the hypernetwork minimises: the distance between the two, in units of the usual change."""
        guess = float(predicted.detach())
        self.product = self.KEPT * self.product + guess * measured
        self.square = self.KEPT * self.square + guess**2
        self.size = self.KEPT * self.size + abs(measured)
        self.weight = self.KEPT * self.weight + 1
        factor = max(self.product, 0.0) / max(self.square, 1e-30)
        usual = max(self.size / self.weight, 1e-12)
        return F.smooth_l1_loss(factor * predicted / usual, predicted.new_tensor(measured / usual))


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
    _held: dict[tuple[tuple[str, bool], ...], Allocator] = field(default_factory=dict)

    def prompt(self) -> Tensor:
        pixels = self.model.stage.pixels()
        return torch.zeros(self.context.data.input_shape) if pixels is None else pixels.cpu()

    def named(self, values: Sequence[Value]) -> dict[str, Value]:
        return dict(zip(self.context.groups.names, values, strict=True))

    @torch.no_grad()
    def scores(self, cuts: Cuts, ratio: float) -> Importance:
        values, _ = self.hyper(self.prompt(), self.statistics, self.prior, cuts, ratio)
        # Scores without a bound (`reach` 0) may get as far.
        return {name: value.double().clamp(-WIDEST, WIDEST).exp().numpy() for name, value in self.named(values).items()}

    def start(self) -> Importance:
        """The importances that the scores start from."""
        return self.named([base.double().exp().numpy() for base in self.prior])

    def solve(
        self,
        scores: Importance,
        ratio: float,
        start: np.ndarray | None = None,
        blocks: Mapping[str, bool] | None = None,
    ) -> Allocation:
        """The allocation for a share of the dense latency; the fastest there is when that share can't be reached.

        Args:
            scores: Importances.
            ratio: The share.
            start: Widths of a solution under similar scores: several times faster than from scratch.
            blocks: Depth groups that stay or go whatever their scores are, as long as the share can be reached so.
        """
        target_ms, allocation = ratio * self.allocator.dense_ms, None
        held = self._holding(blocks) if blocks else self.allocator
        if start is not None:
            allocation = held.narrow(scores, target_ms, start, blocks=True)
        if allocation is None:
            allocation = held.solve(scores, target_ms)
        if allocation is None and blocks:
            allocation = self.allocator.solve(scores, target_ms)
        if allocation is None:
            widths = self.allocator.fastest()
            predicted = float(self.allocator.predict(widths[None])[0])
            allocation = Allocation(self.allocator.structure(scores, widths), widths, predicted, 1.0)
        return allocation

    def _holding(self, blocks: Mapping[str, bool]) -> Allocator:
        """Made once: an allocation is solved every few steps."""
        key = tuple(blocks.items())
        if key not in self._held:
            self._held[key] = self.allocator.holding(blocks)
        return self._held[key]

    def cuts(
        self, previous: Cuts, ratio: float, scratch: bool = True, blocks: Mapping[str, bool] | None = None
    ) -> Cuts:
        """The cuts of the current scores' allocation, which starts from the previous one's unless from `scratch`."""
        scores = self.scores(previous, ratio)
        return self.cuts_of(self.solve(scores, ratio, None if scratch else widths_of(previous), blocks), scores)

    def cuts_of(self, allocation: Allocation, scores: Importance) -> Cuts:
        """The cuts of an allocation that was made from `scores`."""
        return cuts_of(allocation, scores, self.context.groups, self.savings, self.hyper.temperature)

    def probe(self, cuts: Cuts, scores: list[Tensor], generator: torch.Generator) -> Probe | None:
        """A few groups at random, each a level of its grid narrower than under `cuts`; None where nothing can go.

        Or wider, where the weights stay as they are. Weights that train under the masks leave removed units behind:
        brought back, those would seem to be worth nothing, whatever they were worth had they trained along.
        """
        widths = widths_of(cuts)
        alive = self.allocator.alive(widths[None])[0]
        levels = {}
        for g, grid in enumerate(self.allocator.grids):
            wider = () if self.context.config.search.co_adapt else grid[grid > widths[g]][:1]
            near = [int(level) for level in (*grid[grid < widths[g]][-1:], *wider)]
            if alive[g] and near:
                levels[g] = near
        free, hard = list(levels), list(cuts.hard)
        if not free:
            return None
        for index in torch.randperm(len(free), generator=generator)[:PROBED].tolist():
            g = free[index]
            level = levels[g][int(torch.randint(len(levels[g]), (1,), generator=generator))]
            # What is kept stays first: only the difference is the probe's.
            rank = scores[g].detach()
            order = (rank + (rank.max() - rank.min() + 1) * hard[g]).argsort(descending=True)
            hard[g] = torch.zeros_like(hard[g]).index_fill(0, order[:level], 1.0)
        return Probe(tuple(hard), self._gone(tuple(hard)) - self._gone(cuts.hard))

    def _gone(self, hard: tuple[Tensor, ...]) -> Tensor:
        """(all units,), 1 = removed; inside of removed blocks nothing counts, as for the allocator."""
        alive = self.allocator.alive(np.array([[int(mask.sum()) for mask in hard]]))[0]
        return torch.cat([(1 - mask) * float(there) for mask, there in zip(hard, alive, strict=True)])

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


def _learning(
    search: State, importance: Importance, ratio: float, blocks: Mapping[str, bool]
) -> list[tuple[str, bool, str]]:
    """Whether the hypernetwork found anything for a budget, and has room left to find more."""
    found = np.concatenate([np.log(np.asarray(importance[name])) for name in search.context.groups.names])
    correction = found - torch.cat(search.prior).numpy()
    spread, reach = float(correction.std()), search.hyper.reach
    said = f"corrections of log scores spread by {spread:.2f}, from {correction.min():+.2f} to {correction.max():+.2f}"
    checks = [("the hypernetwork learns", spread > LEAST_SPREAD, said)]
    if reach:
        at_bound = float((np.abs(correction) > 0.95 * reach).mean())
        before = search.solve(search.start(), ratio, blocks=blocks).structure
        after = search.solve(importance, ratio, blocks=blocks).structure
        changed = sum(int((np.array(mask) != after.masks[name]).sum()) for name, mask in before.masks.items())
        checks.append(
            (
                "scores have room",
                at_bound < MOST_AT_BOUND,
                f"{at_bound:.0%} of them at their bounds; {changed} units decided otherwise than at the start",
            )
        )
    return checks


def health(
    curves: dict[str, list[float]],
    search: State,
    cuts: Sequence[Cuts],
    importance: Sequence[Importance],
    blocks: Callable[[int], Mapping[str, bool]],
) -> list[dict[str, Any]]:
    """Checks a finished search at its tightest budget: each is ``{"name", "ok", "message"}``.

    Args:
        curves: Of the search.
        search: What was trained.
        cuts: Per budget, the last ones.
        importance: Per budget, as found.
        blocks: Of a budget, the depth groups that trials decided.
    """
    checks = []
    which = int(np.argmin(search.context.ratios))
    own = [i for i, budget in enumerate(curves["budget"]) if budget == which]
    own = own or list(range(len(curves["budget"])))  # fewer steps than budgets: some had none
    tightest = min(curves["asked_ratio"][i] for i in own)
    loss = [curves["loss"][i] for i in own if curves["asked_ratio"][i] == tightest]
    best, last = min(loss), loss[-1]
    checks.append(
        (
            "loss settles",
            bool(np.isfinite(last)) and last <= 1.5 * best + 0.1,
            f"from {loss[0]:.3f} to {last:.3f} at the tightest budget, lowest {best:.3f}",
        )
    )
    checks += _learning(search, importance[which], search.context.ratios[which], blocks(which))
    if search.model.stage.prompt is not None:
        gradient = curves["prompt_grad"][own[-1]]
        checks.append(("prompt learns", gradient > 1e-7, f"mean gradient norm at the end {gradient:.2g}"))
    groups = search.context.groups.groups
    widths = widths_of(cuts[which])[None]
    alive = search.allocator.alive(widths)[0]
    collapsed = [
        group.name
        for g, group in enumerate(groups)
        if group.kind == "channel" and group.fixed is None and alive[g] and widths[0, g] < 0.06 * group.units
    ]
    checks.append(
        ("no group collapsed", not collapsed, ", ".join(collapsed) or "all groups keep at least 6 % of their units")
    )
    return [{"name": name, "ok": bool(ok), "message": message} for name, ok, message in checks]
