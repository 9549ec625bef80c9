from __future__ import annotations

import copy
import dataclasses

import torch
from torch import nn

from passdeploy._torchvision import torchvision
from passdeploy.search.method import SearchContext
from passdeploy.search.sensitivity import measure
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
