"""The hypernetwork and what it sees: exact masks with gradients, for groups of any width."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from passdeploy.groups import find_groups
from passdeploy.models.cifar_resnet import CifarResNet
from passdeploy.search.hypernetwork import Cuts, HyperNetwork
from passdeploy.search.statistics import GROUP_FEATURES, UNIT_FEATURES, Statistics, collect

widths_of_groups = st.lists(st.integers(1, 70), min_size=1, max_size=6)


def made_up(widths: list[int], seed: int = 0) -> tuple[Statistics, list[torch.Tensor], Cuts]:
    generator = torch.Generator().manual_seed(seed)
    unit = tuple(torch.randn(width, len(UNIT_FEATURES), generator=generator) for width in widths)
    group = torch.randn(len(widths), len(GROUP_FEATURES), generator=generator)
    prior = [torch.randn(width, generator=generator) for width in widths]
    hard = tuple((torch.rand(width, generator=generator) < 0.6).float() for width in widths)
    statistics = Statistics(unit, group, tuple(torch.ones(width) for width in widths))
    return statistics, prior, Cuts(torch.zeros(len(widths)), hard)


@settings(max_examples=20, deadline=None)
@given(widths=widths_of_groups, recurrence=st.booleans(), statistics=st.booleans(), reach=st.sampled_from([0.0, 3.0]))
def test_masks_are_exact_for_any_widths(widths: list[int], recurrence: bool, statistics: bool, reach: float) -> None:
    seen, prior, cuts = made_up(widths)
    hyper = HyperNetwork(recurrence=recurrence, statistics=statistics, reach=reach)
    prompt = torch.randn(3, 20, 14, requires_grad=True)
    scores, masks = hyper(prompt, seen, prior, cuts, 0.5)
    assert [len(mask) for mask in masks] == widths
    for mask, hard, score, base in zip(masks, cuts.hard, scores, prior, strict=True):
        assert torch.equal(mask.detach(), hard)
        assert torch.isfinite(score).all()
        if reach:
            assert (score - base).abs().max() <= reach + 1e-5
    sum((mask * torch.arange(1, len(mask) + 1)).sum() for mask in masks).backward()  # type: ignore[union-attr]
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in hyper.parameters())
    head = hyper.head[-1]
    assert isinstance(head, nn.Linear)
    assert head.weight.grad is not None
    if sum(widths) > 1:  # of one unit alone there is nothing to decide
        assert head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("reach", [3.0, 0.0])
def test_what_all_scores_share_is_left_out(reach: float) -> None:
    """However far the head is driven: what decides is how corrections differ, and the bound must leave them room."""
    seen, prior, cuts = made_up([8, 16, 1])
    torch.manual_seed(0)
    hyper = HyperNetwork(reach=reach)
    last = hyper.head[-1]
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        last.weight.normal_(0, 0.3)
        before = hyper(torch.ones(3, 8, 8), seen, prior, cuts, 0.5)[0]
        last.bias += 100
        after = hyper(torch.ones(3, 8, 8), seen, prior, cuts, 0.5)[0]
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)
    assert max(float((a - b).abs().max()) for a, b in zip(before, prior, strict=True)) > 0.01


def test_it_starts_at_the_prior_and_learns_from_the_prompt() -> None:
    seen, prior, cuts = made_up([8, 16, 1])
    torch.manual_seed(0)
    hyper = HyperNetwork()
    prompt = torch.randn(3, 16, 16, requires_grad=True)
    scores, _ = hyper(prompt, seen, prior, cuts, 0.5)
    for score, base in zip(scores, prior, strict=True):
        assert torch.equal(score, base)
    with torch.no_grad():
        last = hyper.head[-1]
        assert isinstance(last, nn.Linear)
        last.weight.normal_(0, 0.5)
    scores, _ = hyper(prompt, seen, prior, cuts, 0.5)
    torch.cat(scores).square().sum().backward()
    assert prompt.grad is not None
    assert prompt.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in hyper.encoder.parameters() if p.ndim > 1)


def scores_with(hyper: HyperNetwork, cuts: Cuts, budget: float = 0.5) -> torch.Tensor:
    seen, prior, _ = made_up([8, 16, 4])
    with torch.no_grad():
        last = hyper.head[-1]
        assert isinstance(last, nn.Linear)
        last.weight.copy_(torch.linspace(-1, 1, last.in_features)[None])
        scores = torch.cat(hyper(torch.ones(3, 8, 8), seen, prior, cuts, budget)[0])
        return scores - scores[:8].mean()  # what all share is taken out: against the first group's


def test_what_the_scores_depend_on() -> None:
    """The previous group's mask and the budget; without recurrence the mask still reaches its neighbour."""
    _, _, cuts = made_up([8, 16, 4])
    flipped = Cuts(cuts.thresholds, (1 - cuts.hard[0], *cuts.hard[1:]))
    torch.manual_seed(0)
    hyper = HyperNetwork(reach=0.0)
    before, after = scores_with(hyper, cuts), scores_with(hyper, flipped)
    assert torch.allclose(before[:8], after[:8], atol=1e-5)
    assert not torch.allclose(before[8:24], after[8:24], atol=1e-4)
    assert not torch.allclose(before[24:], after[24:], atol=1e-4)
    assert not torch.allclose(before, scores_with(hyper, cuts, budget=0.3), atol=1e-4)
    torch.manual_seed(0)
    forgetful = HyperNetwork(recurrence=False, reach=0.0)
    before, after = scores_with(forgetful, cuts), scores_with(forgetful, flipped)
    assert not torch.allclose(before[8:24], after[8:24], atol=1e-4)
    assert torch.allclose(before[24:], after[24:], atol=1e-5)


@pytest.mark.parametrize("memory", ["previous", "all"])
@pytest.mark.parametrize("recurrence", [True, False])
@torch.no_grad()
def test_the_batched_walk_is_the_walk_group_by_group(memory: str, recurrence: bool) -> None:
    seen, prior, cuts = made_up([8, 16, 1, 40])
    torch.manual_seed(0)
    hyper = HyperNetwork(memory=memory, recurrence=recurrence, reach=2.0)
    last = hyper.head[-1]
    assert isinstance(last, nn.Linear)
    last.weight.normal_()
    prompt = torch.randn(3, 12, 12)
    scores, _ = hyper(prompt, seen, prior, cuts, 0.4)
    cell = nn.LSTMCell(64, 64)
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in hyper.lstm.state_dict().items()})
    hidden, carried = hyper.initial(hyper.encoder(prompt)).chunk(2)
    start = state = (hidden.tanh()[None], carried[None])
    earlier, deltas = [torch.ones(16)], []
    for g, units in enumerate(seen.unit):
        before = earlier[-1] if memory == "previous" or g == 0 else torch.stack(earlier[1:]).mean(0)
        pooled = torch.cat([units.mean(0), units.amax(0), units.amin(0)])
        inputs = torch.cat([seen.group[g], pooled, before, torch.tensor([0.4]).log()])
        state = cell(hyper.embed(inputs).relu()[None], state if recurrence else start)
        delta = torch.stack([hyper.head(torch.cat([state[0][0], unit])) for unit in units])[:, 0]
        deltas.append(delta)
        earlier.append(nn.functional.adaptive_avg_pool1d(cuts.hard[g][None], 16)[0])
    shared = torch.stack([delta.mean() for delta in deltas]).mean()
    for score, base, delta in zip(scores, prior, deltas, strict=True):
        torch.testing.assert_close(score, base + 2 * torch.tanh((delta - shared) / 2), atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return CifarResNet((2, 2, 1), 3, (8, 16, 16)).eval()


def test_statistics_are_standardised(network: nn.Module) -> None:
    groups = find_groups(network, torch.zeros(2, 3, 12, 12))
    prior = {name: torch.linspace(-3, 0, units) for name, units in groups.units.items()}
    found = collect(network, groups, prior, torch.linspace(0, 1, len(groups.groups)))
    assert found.group.shape == (len(groups.groups), len(GROUP_FEATURES))
    assert torch.isfinite(found.group).all()
    for group, unit, magnitude in zip(groups.groups, found.unit, found.magnitude, strict=True):
        assert unit.shape == (group.units, len(UNIT_FEATURES))
        assert magnitude.shape == (group.units,)
        assert (magnitude > 0).all()
        if group.units > 1:
            assert unit.mean(0).abs().max() < 1e-4
            assert (unit[:, -1].diff() > 0).all()  # the prior, in its order
        else:
            assert (unit == 0).all()


def test_a_louder_channel_has_the_larger_magnitude(network: nn.Module) -> None:
    import copy

    louder = copy.deepcopy(network)
    groups = find_groups(louder, torch.zeros(2, 3, 12, 12))
    inner = next(g for g in groups.groups if any(m.module == "layer2.1.conv1" and m.side == "out" for m in g.members))
    with torch.no_grad():
        louder.get_submodule("layer2.1.conv1").weight[5] *= 10  # type: ignore[index, operator]
    prior = {name: torch.zeros(units) for name, units in groups.units.items()}
    found = collect(louder, groups, prior, torch.zeros(len(groups.groups)))
    assert int(found.magnitude[groups.names.index(inner.name)].argmax()) == 5
