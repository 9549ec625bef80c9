"""What the hypernetwork learns from: small changes of the masks, and what they do to the loss."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from passdeploy.latency.roofline import Roofline
from passdeploy.search import trainer
from passdeploy.search.baselines.variants import changed
from passdeploy.search.hypernetwork import Cuts
from passdeploy.search.method import SearchContext
from passdeploy.search.state import PROBED, Consequences, Probe, State, health, prepare, widths_of
from passdeploy.search.trainer import search_pass
from passdeploy.subject import load_subject
from passdeploy.targets import resolve
from passdeploy.training import task_loss
from tests.search import test_baselines

context = test_baselines.context


@pytest.fixture(scope="module")
def search(context: SearchContext) -> State:
    return prepare(context)


def scores(search: State, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [base + torch.randn(base.shape, generator=generator) for base in search.prior]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("ratio", [0.9, 0.6])
def test_a_probe_is_a_level_of_a_few_groups_and_predicts_what_the_allocator_counts(
    search: State, seed: int, ratio: float
) -> None:
    logs = scores(search, seed)
    importance = search.named([value.double().exp().numpy() for value in logs])
    allocation = search.solve(importance, ratio)
    cuts = search.cuts_of(allocation, importance)
    probe = search.probe(cuts, logs, torch.Generator().manual_seed(seed))
    assert probe is not None
    before = widths_of(cuts)
    after = np.array([int(mask.sum()) for mask in probe.hard])
    moved = np.flatnonzero(before != after)
    assert 1 <= len(moved) <= PROBED
    for g in moved:
        grid = list(search.allocator.grids[g])
        assert grid.index(after[g]) == grid.index(before[g]) - 1
        assert torch.equal(probe.hard[g] * cuts.hard[g], probe.hard[g])  # nothing new is kept
    cost = search.allocator.tables(importance)
    losses = search.allocator.losses(np.stack([before, after]), cost)
    assert float(probe.predicted(logs)) == pytest.approx(losses[1] - losses[0], rel=1e-4, abs=1e-6)


def test_units_are_brought_back_only_where_the_weights_stay(context: SearchContext) -> None:
    """Weights that trained without a unit say that it is worth nothing, whatever it was worth."""
    grew = dict.fromkeys((True, False), False)
    for co_adapt in grew:
        search = prepare(changed(context, co_adapt=co_adapt))
        logs = scores(search, 0)
        importance = search.named([value.double().exp().numpy() for value in logs])
        cuts = search.cuts_of(search.solve(importance, 0.6), importance)
        for seed in range(20):
            probe = search.probe(cuts, logs, torch.Generator().manual_seed(seed))
            assert probe is not None
            grew[co_adapt] |= any(bool((a > b).any()) for a, b in zip(probe.hard, cuts.hard, strict=True))
    assert grew == {True: False, False: True}


def test_nothing_is_probed_where_nothing_can_go(search: State) -> None:
    narrowest = search.allocator.structure(
        search.named([value.double().exp().numpy() for value in search.prior]), search.allocator.fastest()
    )
    bare = Cuts(
        torch.zeros(len(search.prior)),
        tuple(torch.tensor(narrowest.masks[name], dtype=torch.float32) for name in search.context.groups.names),
    )
    assert search.probe(bare, search.prior, torch.Generator().manual_seed(0)) is None


def test_what_drops_out_is_the_same_in_a_probe(context: SearchContext, monkeypatch: pytest.MonkeyPatch) -> None:
    network = nn.Sequential(copy.deepcopy(context.network), nn.Dropout(0.5))
    subject = load_subject(context.config, network, context.data)
    seen: list[float] = []
    unchanged = Probe(tuple(torch.ones(group.units) for group in subject.groups.groups), torch.zeros(1))

    def error(self: Consequences, predicted: torch.Tensor, measured: float) -> torch.Tensor:
        seen.append(measured)
        return torch.zeros((), requires_grad=True)

    monkeypatch.setattr(State, "probe", lambda self, cuts, scores, generator: replace(unchanged, hard=cuts.hard))
    monkeypatch.setattr(Probe, "predicted", lambda self, scores: torch.zeros(()))
    monkeypatch.setattr(Consequences, "error", error)
    own = replace(context, network=subject.network, groups=subject.groups, operators=subject.operators)
    units = list(subject.groups.units.values())
    predictor = Roofline(subject.operators, units, resolve("cpu"))
    search_pass(changed(replace(own, predictor=predictor), min_steps=6, hyper_every=1, lr=0.0))
    assert seen == [0.0] * 6


def test_a_probe_under_which_the_loss_overflows_teaches_nothing(
    context: SearchContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A single infinity would stay in the running sums, and make every later score NaN."""
    measured: list[float] = []

    def overflowing(*given: Any) -> torch.Tensor:
        loss = task_loss(*given)
        if torch.is_grad_enabled():
            return loss
        measured.append(float("inf") if not measured else float(loss))
        return loss.new_tensor(measured[-1])

    monkeypatch.setattr(trainer, "task_loss", overflowing)
    (importance,) = search_pass(changed(context, min_steps=12, hyper_every=2)).importance
    assert len(measured) > 2
    assert all(bool(values.isfinite().all()) for values in importance.values())


def test_scores_become_what_was_measured_up_to_a_factor() -> None:
    """From sums of a few at a time, with noise: their order and their relations, which are all that decides."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.tensor([0.01, 0.02, 0.05, 0.1, 0.3, 1.0])
    logs = torch.full((6,), -2.0, requires_grad=True)
    adam, seen = torch.optim.Adam([logs], lr=0.05), Consequences()
    errors = []
    for _ in range(600):
        sign = torch.randint(-1, 2, (6,), generator=generator).float()
        measured = float((sign * truth).sum() + 0.01 * torch.randn((), generator=generator))
        error = seen.error((sign * logs.exp()).sum(), measured)
        adam.zero_grad()
        error.backward()
        adam.step()
        errors.append(float(error.detach()))
    found = logs.detach().exp()
    torch.testing.assert_close((found / found[-1])[2:], truth[2:], rtol=0.3, atol=0)
    assert found[0] < found[2] and found[1] < found[3]
    assert np.mean(errors[-100:]) < 0.2 * np.mean(errors[:20])


def test_the_search_learns_and_keeps_room_to_learn(context: SearchContext) -> None:
    found = search_pass(changed(context, min_steps=24, hyper_every=1, hyper_lr=0.01))
    health = {check["name"]: check for check in found.health}
    assert health["the hypernetwork learns"]["ok"], health
    assert health["scores have room"]["ok"], health
    base = torch.cat(prepare(context).prior)
    correction = torch.cat([values.log() for values in found.importance[0].values()]) - base
    assert correction.abs().mean() < 1.5
    assert correction.std() > 0.01


def test_a_hypernetwork_that_learns_nothing_is_told(context: SearchContext) -> None:
    found = search_pass(changed(context, hyper_lr=0.0))
    assert not next(check for check in found.health if check["name"] == "the hypernetwork learns")["ok"]


def test_health_is_that_of_the_tightest_budget(context: SearchContext) -> None:
    search = prepare(replace(context, ratios=(0.9, 0.3)))
    importance = search.named([value.double().exp().numpy() for value in search.prior])
    wide = search.open()
    name = next(group.name for group in context.groups.groups if group.kind == "channel")
    thin = [torch.zeros_like(mask) if each == name else mask for each, mask in search.named(wide.hard).items()]
    cuts = [wide, Cuts(wide.thresholds, tuple(thin))]
    curves = {"budget": [0, 1], "asked_ratio": [0.9, 0.3], "loss": [1.0, 1.0], "prompt_grad": [1.0, 1.0]}
    checks = {check["name"]: check for check in health(curves, search, cuts, [importance] * 2, lambda _: {})}
    assert checks["no group collapsed"] == {"name": "no group collapsed", "ok": False, "message": name}
