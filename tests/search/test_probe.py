"""What the hypernetwork learns from: small changes of the masks, and what they do to the loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from passdeploy.search.baselines.variants import changed
from passdeploy.search.method import SearchContext
from passdeploy.search.state import PROBED, Consequences, State, prepare, widths_of
from passdeploy.search.trainer import search_pass
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
    before = widths_of(cuts)
    after = np.array([int(mask.sum()) for mask in probe.hard])
    moved = np.flatnonzero(before != after)
    assert 1 <= len(moved) <= PROBED
    for g in moved:
        grid = list(search.allocator.grids[g])
        assert abs(grid.index(after[g]) - grid.index(before[g])) == 1
        narrower = min(probe.hard[g], cuts.hard[g], key=lambda mask: float(mask.sum()))
        assert torch.equal(probe.hard[g] * cuts.hard[g], narrower)  # one holds the other
    cost = search.allocator.tables(importance)
    losses = search.allocator.losses(np.stack([before, after]), cost)
    assert float(probe.predicted(logs)) == pytest.approx(losses[1] - losses[0], rel=1e-4, abs=1e-6)


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
