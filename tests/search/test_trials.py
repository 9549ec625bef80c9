"""Which blocks go, by trial: the sets that are tried, what trying them costs, and that the decision is kept to."""

from __future__ import annotations

import copy
import gc
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from passdeploy.checkpoint import Checkpoint
from passdeploy.errors import BadInput
from passdeploy.groups import macs
from passdeploy.search import race as racing
from passdeploy.search.baselines.variants import changed
from passdeploy.search.latency_allocator import LatencyAllocator
from passdeploy.search.method import SearchContext, SearchResult
from passdeploy.search.prompt import Prompted
from passdeploy.search.race import BACKWARD, Entrant, Race, alternatives, blocks_of, halves, race_length, removable
from passdeploy.search.state import prepare
from passdeploy.search.trainer import search_pass
from passdeploy.structure import Structure
from passdeploy.surgery import put_back, thin
from tests.search import test_allocator, test_baselines

context = test_baselines.context


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Races of fewer steps than say anything: what they do is the same."""
    monkeypatch.setattr(racing, "SHORTEST", 6)
    monkeypatch.setattr(racing, "LONGEST", 8)


shortly = pytest.mark.usefixtures("short")


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ratio", [0.8, 0.5])
def test_what_is_tried_are_the_likeliest_sets_of_blocks(seed: int, ratio: float) -> None:
    allocator, importance = test_allocator.allocator("latency"), test_allocator.importance(seed)
    target_ms = ratio * allocator.dense_ms
    found = alternatives(allocator, importance, target_ms, 5)
    names, cost = removable(allocator), allocator.tables(importance)
    sets = [tuple(blocks_of(each, names).values()) for each in found]
    losses = [float(allocator.losses(each.widths[None], cost)[0]) for each in found]
    first = allocator.solve(importance, target_ms)
    assert first is not None and found[0].structure == first.structure
    assert len(set(sets)) == len(sets) and 2 <= len(sets) <= 5
    assert losses[1:] == sorted(losses[1:])
    assert all(each.predicted_ms <= target_ms for each in found)
    assert len(alternatives(allocator, importance, target_ms, 1)) == 1
    assert alternatives(allocator, importance, 0.0, 5) == []


@pytest.mark.parametrize("kind", ["latency", "knapsack", "global", "uniform"])
@pytest.mark.parametrize("stays", [True, False])
def test_held_blocks_are_held_whatever_their_scores(kind: str, stays: bool) -> None:
    allocator, importance = test_allocator.allocator(kind), test_allocator.importance(0)
    name = removable(allocator)[0]
    against = importance | {name: np.array([1e-9 if stays else 1e9])}
    found = allocator.holding({name: stays}).solve(against, 0.7 * allocator.dense_ms)
    assert found is not None
    assert blocks_of(found, (name,)) == {name: stays}
    assert len(allocator.grids[allocator.groups.names.index(name)]) == 2  # the allocator itself is as it was


@pytest.mark.parametrize("steps", [0.0, 10.0, 40.0, 75.0, 113.0, 200.0, 1e4])
@pytest.mark.parametrize("cost", [0.1, 0.3, 0.7])
def test_a_race_keeps_within_its_steps(steps: float, cost: float) -> None:
    costs = [cost * (1 + 0.01 * n) for n in range(6)]
    count, half = race_length(steps, costs, 0.25)
    assert half == 0 or (racing.SHORTEST <= half <= racing.LONGEST and 2 <= count <= 6)
    spent = sum(half * (0.25 + sum(sorted(costs[:count], reverse=True)[:left])) for left in halves(count))
    assert spent <= steps
    if count < 6:  # one more would not have fitted
        more = sum(racing.SHORTEST * (0.25 + sum(sorted(costs[: count + 1])[-left:])) for left in halves(count + 1))
        assert more > steps or (count == 0 and sum(racing.SHORTEST * (0.25 + sum(costs[:2])) for _ in range(2)) > steps)


def test_weights_are_put_back_where_they_were_cut_from(context: SearchContext) -> None:
    allocator = LatencyAllocator(context.groups, context.predictor, context.allocator("latency").grids)
    scores = {name: np.random.default_rng(0).lognormal(-5, 2, n) for name, n in context.groups.units.items()}
    found = allocator.solve(scores, 0.6 * allocator.dense_ms)
    assert found is not None
    before = {name: value.clone() for name, value in context.network.state_dict().items()}
    small = thin(context.network, context.groups, found.structure)
    with torch.no_grad():
        for value in small.parameters():
            value.add_(1.0)
    state = put_back(context.network, context.groups, found.structure, small)
    whole = copy.deepcopy(context.network)
    whole.load_state_dict(state)
    again = thin(whole, context.groups, found.structure).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in small.state_dict().items())
    added = sum(int((value != before[name]).sum()) for name, value in state.items())
    assert added == sum(value.numel() for value in small.parameters())  # nothing else has changed
    assert all(torch.equal(value, before[name]) for name, value in context.network.state_dict().items())


def test_a_mask_of_truth_values_is_put_back_whole(context: SearchContext) -> None:
    """Positions can't be written into it."""
    network = copy.deepcopy(context.network)
    seen = torch.tensor([False, True, True])
    network.register_buffer("seen", seen.clone())
    whole = {name: (True,) * units for name, units in context.groups.units.items()}
    small = thin(network, context.groups, Structure(whole))
    small.get_buffer("seen").logical_not_()
    assert torch.equal(put_back(network, context.groups, Structure(whole), small)["seen"], ~seen)


def race(context: SearchContext, steps: float = 150.0) -> Race:
    from passdeploy.search.trainer import train_settings

    return Race(context, prepare(context), None, train_settings(context.config.search, context), 0.6, steps)


@shortly
def test_all_train_on_the_same_batches_and_the_better_half_goes_on(context: SearchContext) -> None:
    run = race(changed(context, trials=4, distill=0.0))
    assert len(run.all) >= 3
    left: list[int] = []
    run.run(lambda: left.append(len(run.entrants)))
    first, second = halves(len(run.all))
    assert left == [first] * run.half + [second] * run.half
    assert run.entrants == sorted(run.entrants, key=lambda each: each.judged())
    at_half = [sum(each.losses[run.half // 2 : run.half]) for each in run.all]
    assert {run.all.index(each) for each in run.entrants} == set(np.argsort(at_half)[:second].tolist())
    share = [float(macs(context.operators, run.search.allocator.left(e.allocation.widths))) for e in run.all]
    expected = sum(len(e.losses) * s for e, s in zip(run.all, share, strict=True)) / macs(context.operators)
    assert run.spent == pytest.approx(expected) and run.spent <= 150
    assert run.shared == 0 and BACKWARD == 2


@shortly
def test_an_interrupted_race_ends_as_an_undisturbed_one(context: SearchContext) -> None:
    own = changed(context, trials=3, distill=0.0)
    whole, half = race(own), race(own)
    whole.run(lambda: None)
    for at in (3, whole.half, whole.half + 2):
        half = race(own)
        saved: dict[str, object] = {}

        def stop(half: Race = half, at: int = at, saved: dict[str, object] = saved) -> None:
            if half.steps == at:
                saved |= copy.deepcopy(half.state())
                raise InterruptedError

        with pytest.raises(InterruptedError):
            half.run(stop)
        again = race(own)
        again.resume(saved)
        again.run(lambda: None)
        assert [each.losses for each in again.all] == [each.losses for each in whole.all]
        assert (again.spent, again.told()) == (pytest.approx(whole.spent), whole.told())
        for name, value in trained(whole, whole.entrants[0]).state_dict().items():
            assert torch.equal(value, trained(again, again.entrants[0]).state_dict()[name])


def trained(run: Race, entrant: Entrant) -> Prompted:
    return run.training[entrant].model


@shortly
def test_a_race_that_others_were_in_begins_anew(context: SearchContext) -> None:
    """As after a move to a machine that measures sensitivities to other last digits."""
    own = changed(context, trials=3, distill=0.0)
    whole, other, again = race(own), race(changed(own, trials=2)), race(own)
    whole.run(lambda: None)
    other.run(lambda: None)
    again.resume(other.state())
    assert again.steps == 0 and len(again.training) == len(again.all)
    again.run(lambda: None)
    assert again.told() == whole.told()


@shortly
def test_networks_of_the_beaten_are_let_go(context: SearchContext) -> None:
    run = race(changed(context, trials=4, distill=0.0))
    networks = {each: weakref.ref(trained(run, each)) for each in run.all}
    run.run(lambda: None)
    gc.collect()
    assert {each for each, network in networks.items() if network() is not None} == set(run.entrants)
    assert all(value.grad is None for each in run.entrants for value in trained(run, each).parameters())


def removed(result: SearchResult, structure: Structure, budget: int = 0) -> bool:
    blocks = result.blocks_of(budget)
    return all(any(structure.masks[name]) == stays for name, stays in blocks.items())


@shortly
@pytest.mark.parametrize("ratios", [(0.6,), (0.8, 0.6)])
def test_the_decision_is_kept_and_the_search_takes_no_more_steps(
    context: SearchContext, ratios: tuple[float, ...], tmp_path: Path
) -> None:
    said: list[tuple[int, int]] = []
    own = replace(context, ratios=ratios, progress=lambda done, total, _: said.append((done, total)))
    total = 30 * len(ratios) ** 2  # of several budgets trials may take half as much
    found = search_pass(changed(own, min_steps=total, trials=3, resolve_every=8))
    assert found.curves["step"][-1] + found.unspent_steps == total
    assert (found.unspent_steps > 0) == (len(ratios) == 1)  # weights that several budgets share start anew
    done = [step for step, of in said if of in (total, total - found.unspent_steps)]
    assert done == sorted(done) and done[-1] == total - found.unspent_steps
    assert [check["ok"] for check in found.health if check["name"] == "blocks tried"] == [True] * len(ratios)
    found.save(tmp_path)
    loaded = SearchResult.load(tmp_path)
    allocator = context.allocator("latency")
    for budget, ratio in enumerate(ratios):
        blocks = loaded.blocks_of(budget)
        assert set(blocks) == set(removable(allocator))
        held = allocator.holding(blocks).solve(loaded.importance_arrays(budget), ratio * allocator.dense_ms)
        assert held is not None and removed(loaded, held.structure, budget)


@shortly
def test_nothing_is_tried_where_nothing_would_come_of_it(context: SearchContext) -> None:
    for settings in ({"trials": 1}, {"co_adapt": False}, {"depth": False}, {"min_steps": 6}):
        found = search_pass(changed(context, **{"min_steps": 30, "trials": 3, **settings}))
        assert not any(found.blocks_of(0)), settings
        assert not any(check["name"] == "blocks tried" for check in found.health)


@shortly
def test_a_search_killed_in_its_trials_goes_on(context: SearchContext, tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    own = changed(context, min_steps=30, trials=3)
    whole = search_pass(own)

    def kill(done: int, total: int, said: str) -> None:
        if total == 30 and said.startswith("trying") and done >= 4:
            raise Killed

    checkpoint = Checkpoint(tmp_path / "search.ckpt", every_s=0.0, times_its_cost=0.0)
    with pytest.raises(Killed):
        search_pass(replace(own, checkpoint=checkpoint, progress=kill))
    again = search_pass(replace(own, checkpoint=checkpoint))
    assert again.blocks == whole.blocks and again.health == whole.health
    for name, value in whole.network.items():
        assert torch.equal(value, again.network[name])


@shortly
def test_what_diverges_loses(context: SearchContext) -> None:
    run = race(changed(context, trials=3, distill=0.0))
    first = run.all[0]
    with torch.no_grad():
        next(trained(run, first).network.parameters()).fill_(float("nan"))
    run.run(lambda: None)
    assert run.entrants[0] is not first and np.isfinite(run.entrants[0].judged())
    again = race(changed(context, trials=3, distill=0.0))
    for each in again.all:
        with torch.no_grad():
            next(trained(again, each).network.parameters()).fill_(float("nan"))
    with pytest.raises(BadInput, match="lower the learning rate"):
        again.run(lambda: None)
