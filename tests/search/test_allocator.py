"""Allocators: never above the target when they return something, and nothing is given up that need not be."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from passdeploy.groups import Groups, control, find_groups, macs, operators
from passdeploy.groups.operators import Operator
from passdeploy.models.cifar_resnet import CifarResNet
from passdeploy.search.allocator import ALLOCATORS, Allocator, width_grids
from passdeploy.search.latency_allocator import LatencyAllocator

FAST = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


class Staircase:
    """A scripted latency: multiplications in steps of channels, and a constant per operator that is left."""

    def __init__(self, ops: tuple[Operator, ...], step: int) -> None:
        self.ops, self.step = ops, step

    def predict_many(self, widths: np.ndarray) -> np.ndarray:
        stepped = np.where(widths > 1, np.ceil(widths / self.step) * self.step, widths)
        left = np.ones((len(widths), len(self.ops)))
        for column, op in enumerate(self.ops):
            for gate in op.gates:
                left[:, column] *= widths[:, gate] > 0
        return np.array([float(macs(self.ops, row)) for row in stepped]) / 1e6 + 0.05 * left.sum(1)


@cache
def network() -> tuple[Groups, tuple[Operator, ...]]:
    torch.manual_seed(0)
    model = CifarResNet((2, 2, 1), 3, (8, 16, 16)).eval()
    example = torch.zeros(2, 3, 12, 12)
    groups = find_groups(model, example)
    return groups, operators(model, example[:1], groups)


@cache
def allocator(kind: str, step: int = 4, depth: bool = True) -> Allocator:
    groups, ops = network()
    return ALLOCATORS[kind](groups, Staircase(ops, step), width_grids(groups, step, 0.1, depth))


def importance(seed: int, spread: float = 2.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.lognormal(-5, spread, units) for name, units in network()[0].units.items()}


seeds = st.integers(0, 2**32 - 1)
ratios = st.floats(0.05, 1.5)


@pytest.mark.parametrize("kind", sorted(set(ALLOCATORS) & {"latency", "global", "uniform"}))
@FAST
@given(seed=seeds, ratio=ratios)
def test_never_above_the_target(kind: str, seed: int, ratio: float) -> None:
    chosen = allocator(kind)
    found = chosen.solve(importance(seed), ratio * chosen.dense_ms)
    fastest = float(chosen.predict(chosen.fastest()[None])[0])
    if found is None:
        # Whoever can't meet it says so; the latency-aware one only where nothing can.
        assert ratio < 1
        if kind == "latency":
            assert fastest > ratio * chosen.dense_ms
        return
    widths = np.array(list(found.structure.widths().values()))
    assert found.predicted_ms <= ratio * chosen.dense_ms
    assert float(chosen.predict(widths[None])[0]) == pytest.approx(found.predicted_ms)
    if ratio >= 1:
        assert found.structure == network()[0].dense()


@FAST
@given(seed=seeds)
def test_widths_inside_of_removed_blocks_mean_nothing(seed: int) -> None:
    groups, _ = network()
    for depth in (True, False):
        chosen, rng = allocator("latency", depth=depth), np.random.default_rng(seed)
        rows = np.array([[rng.choice(grid) for grid in chosen.grids] for _ in range(5)])
        for row, alive in zip(rows, chosen.alive(rows), strict=True):
            kept = dict(zip(groups.names, row, strict=True))
            gone = {name for g in groups.groups if g.kind == "depth" and not kept[g.name] for name in groups.inner(g)}
            assert {name for name, there in zip(groups.names, alive, strict=True) if not there} == gone


@FAST
@given(seed=seeds, ratio=ratios)
def test_structures_are_canonical_and_keep_the_most_important(seed: int, ratio: float) -> None:
    groups, _ = network()
    chosen, scores = allocator("latency"), importance(seed)
    found = chosen.solve(scores, ratio * chosen.dense_ms)
    if found is None:
        return
    assert groups.canonical(found.structure) == found.structure
    alive = chosen.alive(found.widths[None])[0]
    for g, group in enumerate(groups.groups):
        mask = np.array(found.structure.masks[group.name])
        if not alive[g]:
            assert mask.all()
            continue
        assert mask.sum() in chosen.grids[g]
        if group.kind == "channel":
            assert mask.any()
            if not mask.all():
                assert scores[group.name][mask].min() >= scores[group.name][~mask].max()


@FAST
@given(seed=seeds, ratios=st.tuples(ratios, ratios))
def test_more_time_is_never_less_reachable(seed: int, ratios: tuple[float, float]) -> None:
    low, high = sorted(ratios)
    for kind in ("latency", "global", "uniform"):
        chosen, scores = allocator(kind), importance(seed)
        tight, loose = (chosen.solve(scores, ratio * chosen.dense_ms) for ratio in (low, high))
        if tight is None:
            continue
        assert loose is not None
        if kind != "latency":  # one number decides: more time, nothing removed that stays with less
            assert (loose.widths >= tight.widths).all()


@FAST
@given(seed=seeds, ratio=st.floats(0.35, 0.95))
def test_nothing_is_given_up_for_nothing(seed: int, ratio: float) -> None:
    """No single group of what the latency-aware allocator returns could be one step wider inside the target."""
    chosen, scores = allocator("latency"), importance(seed)
    target = ratio * chosen.dense_ms
    found = chosen.solve(scores, target)
    assert isinstance(chosen, LatencyAllocator)
    if found is None:
        return
    wider = chosen._moves(found.widths, True, True, 1)
    if len(wider):
        cost = chosen.tables(scores)
        helps = chosen.losses(wider, cost) < chosen.losses(found.widths[None], cost)[0] - 1e-12
        assert not (helps & (chosen.predict(wider) <= target)).any()


class Widest:
    """A scripted latency: what keeps the largest share of its units decides alone."""

    def predict_many(self, widths: np.ndarray) -> np.ndarray:
        shares: np.ndarray = widths / np.array(list(network()[0].units.values()))
        channels = [group.kind == "channel" for group in network()[0].groups]
        return shares[:, channels].max(1)


def test_a_target_that_no_single_step_comes_nearer_to_is_reached() -> None:
    chosen = LatencyAllocator(network()[0], Widest(), width_grids(network()[0], 4, 0.1, depth=False))
    found = chosen.solve(importance(0), 0.6)
    assert found is not None and found.predicted_ms <= 0.6
    assert list(found.widths) == [grid[grid <= 0.6 * grid[-1]][-1] if len(grid) > 1 else 1 for grid in chosen.grids]
    assert chosen.solve(importance(0), 0.4) is None


@FAST
@given(seed=seeds, ratio=st.floats(0.35, 0.95))
def test_it_loses_no_more_than_either_of_the_searches_it_starts_from(seed: int, ratio: float) -> None:
    chosen, packing, scores = allocator("latency"), allocator("knapsack"), importance(seed)
    target = ratio * chosen.dense_ms
    found, packed = chosen.solve(scores, target), packing.solve(scores, target)
    assert isinstance(chosen, LatencyAllocator)
    if found is None:
        assert packed is None
        return
    cost = chosen.tables(scores)
    descended = chosen._greedy(cost, target, chosen.widest(), blocks=True)
    rows = np.array([widths for widths in (descended, None if packed is None else packed.widths) if widths is not None])
    assert chosen.losses(found.widths[None], cost)[0] <= chosen.losses(rows, cost).min() + 1e-9


def test_blocks_stay_where_they_must() -> None:
    groups, _ = network()
    chosen = allocator("latency", depth=False)
    found = chosen.solve(importance(1), 0.7 * chosen.dense_ms)
    assert found is not None
    assert all(mask[0] for name, mask in found.structure.masks.items() if groups.units[name] == 1)
    assert (chosen.fastest()[chosen.depth] == 1).all()


def test_a_worthless_block_goes_first() -> None:
    groups, _ = network()
    chosen, scores = allocator("latency"), importance(3, spread=0.1)
    block = next(group for group in groups.groups if group.kind == "depth")
    found = chosen.solve(scores | {block.name: np.array([1e-9])}, 0.93 * chosen.dense_ms)
    assert found is not None
    assert found.structure.masks[block.name] == (False,)


@given(step=st.integers(1, 64), share=st.floats(0, 1), depth=st.booleans())
@FAST
def test_grids(step: int, share: float, depth: bool) -> None:
    groups, _ = network()
    for group, grid in zip(groups.groups, width_grids(groups, step, share, depth), strict=True):
        assert grid[-1] == group.units
        assert (np.diff(grid) > 0).all()
        if group.kind == "depth":
            assert list(grid) == ([0, 1] if depth else [1])
        else:
            assert grid[0] >= max(1, np.ceil(share * group.units))


def test_widths_are_steps_of_what_writes_them() -> None:
    """A flatten multiplies the columns that are read for a channel, not the channels."""
    read = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(7), nn.Flatten(), nn.Linear(64 * 49, 10))
    groups = find_groups(read, torch.zeros(2, 3, 16, 16))
    assert [list(grid) for grid in width_grids(groups, 16, 0.1)] == [[16, 32, 48, 64]]


@pytest.mark.parametrize("kind", ["latency", "global", "uniform", "knapsack"])
@pytest.mark.parametrize("ratio", [0.7, 0.85, 1.2])
def test_the_users_widths_are_kept_to(kind: str, ratio: float) -> None:
    """Of a group inside a block that came back, too: the knapsack had left those at full width."""
    groups, ops = network()
    asked = control(groups, min_width={"layer2.*.conv1": 12}, fixed={"layer1.0.conv1": 4})
    model = Staircase(ops, 4)
    solver = ALLOCATORS[kind](asked, model, width_grids(asked, 4, 0.1))
    fixed, least = groups.names.index("layer1.0.conv1"), groups.names.index("layer2.1.conv1")
    for seed in range(20):
        found = solver.solve(importance(seed), ratio * solver.dense_ms)
        assert found is not None
        assert found.widths[fixed] == 4 or found.widths[groups.names.index("depth:layer1.0")] == 0
        assert found.widths[least] >= 12
        assert model.predict_many(found.widths[None].astype(float))[0] <= ratio * solver.dense_ms


@FAST
@given(seed=seeds, ratio=st.floats(0.3, 1.0), removed=st.integers(0, 3))
def test_narrowing_leaves_the_blocks_as_they_are(seed: int, ratio: float, removed: int) -> None:
    chosen = allocator("latency")
    assert isinstance(chosen, LatencyAllocator)
    start = chosen.widest()
    start[np.flatnonzero(chosen.depth)[:removed]] = 0
    found = chosen.narrow(importance(seed), ratio * chosen.dense_ms, start)
    if found is None:
        lowest = np.where(chosen.depth, start, chosen.fastest())
        assert float(chosen.predict(lowest[None])[0]) > ratio * chosen.dense_ms
    else:
        assert (found.widths[chosen.depth] == start[chosen.depth]).all()
        assert found.predicted_ms <= ratio * chosen.dense_ms + 1e-9


@FAST
@given(seed=seeds, before=st.floats(0.4, 1.0), ratio=st.floats(0.3, 1.0))
def test_a_solution_goes_on_from_an_earlier_one(seed: int, before: float, ratio: float) -> None:
    """Within the target and on the grids; never worse than the earlier one where that is fast enough still."""
    chosen = allocator("latency")
    earlier = chosen.solve(importance(seed), before * chosen.dense_ms)
    assert earlier is not None
    scores = importance(seed + 1)
    found = chosen.narrow(scores, ratio * chosen.dense_ms, earlier.widths, blocks=True)
    if found is None:
        assert ratio < before
        return
    assert found.predicted_ms <= ratio * chosen.dense_ms + 1e-9
    assert all(width in grid for width, grid in zip(found.widths, chosen.grids, strict=True))
    assert found.price >= 0
    if found.widths[chosen.depth].all() and found.predicted_ms < 0.95 * chosen.dense_ms:
        assert found.price > 0
    if earlier.predicted_ms <= ratio * chosen.dense_ms:
        cost = chosen.tables(scores)
        losses = chosen.losses(np.stack([found.widths, earlier.widths]), cost)
        assert losses[0] <= losses[1] + 1e-9
