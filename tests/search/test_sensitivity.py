from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn

from passdeploy._torchvision import torchvision
from passdeploy.search.method import SearchContext
from passdeploy.search.sensitivity import measure, rising, spread
from passdeploy.training import use_batch_statistics
from tests.search import test_baselines

context = test_baselines.context


def dropped() -> nn.Module:
    layer: nn.Module = torchvision().ops.StochasticDepth(0.5, "row")
    return layer


def test_nothing_is_dropped_at_random(context: SearchContext) -> None:
    """The same as without the layers that drop."""
    dropping = copy.deepcopy(context.network)
    dropping.avgpool = nn.Sequential(dropped(), nn.AdaptiveAvgPool2d(1), nn.Dropout(0.5))
    magnitude = {group.name: torch.arange(1.0, group.units + 1) for group in context.groups.groups}
    plain = measure(context, magnitude)
    found = measure(dataclasses.replace(context, network=dropping), magnitude)
    for name, importance in plain.items():
        assert torch.equal(importance, found[name])


def test_only_batch_norms_are_in_train_mode() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), dropped(), nn.Dropout(0.5), nn.BatchNorm1d(3)).train()
    use_batch_statistics(model)
    assert [module.training for module in model] == [True, False, False, True]


@pytest.mark.parametrize(
    ("losses", "first"),
    [([0.01, 0.03, 0.08], 0.01), ([0.001, 0.03, 0.035], 0.001), ([0.08, 0.12, 0.3], 0.2 / 3), ([0.5, 0.5, 0.5], None)],
)
def test_a_groups_loss_is_spread_whole_over_its_units(losses: list[float], first: float | None) -> None:
    """By magnitude; where the measured curve flattens the rest of the loss stays where it was measured."""
    magnitude = torch.tensor([5.0, 1, 3, 2, 8, 7, 6, 4])
    importance = spread(magnitude, losses)
    assert (importance > 0).all()
    assert torch.equal(importance.argsort(), magnitude.argsort())
    last = losses[2] + 2 * max(losses[2] - losses[1], losses[2] / 3)
    assert float(importance.sum()) == pytest.approx(last, rel=0.01)
    lowest = importance[magnitude.argsort()].cumsum(0)
    if losses == [0.01, 0.03, 0.08]:  # rises by itself: nothing to be averaged
        assert lowest[[1, 3, 5]].tolist() == pytest.approx(losses, rel=1e-3)
    if first is not None:
        assert float(lowest[1]) <= first * 1.01


def test_rising() -> None:
    found = rising(torch.tensor([1.0, 3, 2, 4, 0, 9], dtype=torch.float64))
    assert found.tolist() == pytest.approx([1, 2.25, 2.25, 2.25, 2.25, 9], rel=1e-5)
    assert (found.diff() > 0).all()
