from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from passdeploy.errors import BadInput
from passdeploy.groups import Groups, control, find_groups
from passdeploy.groups.check import masked_against_thin, random_structure
from passdeploy.models import build
from passdeploy.search.allocator import width_grids
from tests.groups.nets import MadeUp, Mixed, ready


@pytest.fixture(scope="module")
def groups() -> Groups:
    return find_groups(build("resnet20", 10), torch.rand(1, 3, 32, 32), check=False)


def _of(groups: Groups, name: str) -> Any:
    return groups.groups[groups.names.index(name)]


def test_least_width_reaches_the_grids(groups: Groups) -> None:
    asked = control(groups, min_width={"layer3": 40, "layer2.0.conv1": 3})
    grids = dict(zip(asked.names, width_grids(asked, 8, 0.0), strict=True))
    assert list(grids["layer3.1.conv1"]) == [40, 48, 56, 64]
    assert list(grids["layer3.0.downsample.0"]) == [40, 48, 56, 64]
    assert list(grids["layer2.0.conv1"]) == [8, 16, 24, 32]
    assert min(grids["layer1.0.conv1"]) < 16
    assert _of(asked, "depth:layer3.1").least == 1


def test_fixed_width_is_the_only_one(groups: Groups) -> None:
    asked = control(groups, fixed={"layer2.*.conv1": 24, "conv1": 16})
    grids = dict(zip(asked.names, width_grids(asked, 8, 0.5), strict=True))
    assert [list(grids[f"layer2.{i}.conv1"]) for i in range(3)] == [[24]] * 3
    assert list(grids["conv1"]) == [16]


def test_widths_are_in_channels_of_the_named_layer() -> None:
    found = find_groups(ready(MadeUp()), torch.rand(1, 3, 48, 40))
    asked = control(found, min_width={"grouped.1": 9})  # four channels go with each unit
    assert _of(asked, "grouped.0").least == 3
    with pytest.raises(BadInput, match=r"4..16 channels in steps of 4, not 9"):
        control(found, fixed={"grouped.1": 9})


def test_a_layer_whose_channels_are_of_several_groups() -> None:
    """5 of the 8 go to one layer and 3 to another."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Mixed(), nn.Conv2d(10, 2, 1), nn.AdaptiveAvgPool2d(1)).eval()
    found = find_groups(model, torch.rand(1, 3, 8, 8))
    least = [g.least for g in control(found, min_width={"0": 6}).groups if g.name.split(":")[0] == "0"]
    assert len(least) == 2 and 6 <= sum(least) <= 7
    with pytest.raises(BadInput, match=r"9 is outside 1..8, the channels of 0"):
        control(found, min_width={"0": 9})
    with pytest.raises(BadInput, match="the 8 channels of 0 are not pruned together"):
        control(found, fixed={"0": 3})


def test_tied_layers_keep_the_same_units(groups: Groups) -> None:
    asked = control(groups, tie=[["layer1.0.conv1", "layer1.1.conv1"]])
    assert len(asked.names) == len(groups.names) - 1
    tied = _of(asked, "layer1.0.conv1")
    assert {"layer1.0.conv1", "layer1.1.conv1", "layer1.1.bn1"} <= {m.module for m in tied.members}
    model, images = ready(build("resnet20", 10)), torch.rand(2, 3, 32, 32)
    for seed in range(3):
        structure = random_structure(asked, seed)
        assert masked_against_thin(model, asked, structure, images) <= 1e-4


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"min_width": {"layr1": 8}}, r"groups.min_width 'layr1': names no layer whose width can change"),
        ({"min_width": {"layer1.0.conv1": 17}}, r"17 is outside 1..16, the channels of layer1.0.conv1"),
        ({"fixed": {"fc": 5}}, r"'fc': .*\(its channels are the network's outputs\)"),
        ({"fixed": {"layer1.0.conv1": 99}}, r"can have 1..16 channels in steps of 1, not 99"),
        ({"fixed": {"layer1.0.conv1": 8, "layer1.*.conv1": 9}}, "is fixed at another width already"),
        ({"fixed": {"layer1.0.conv1": 8}, "min_width": {"layer1": 12}}, "less than groups.min_width"),
        ({"tie": [["layer1.0.conv1"]]}, "names a single group, layer1.0.conv1"),
        ({"tie": [["layer1.0.conv1", "layer2.0.conv1"]]}, "has 16 units, layer2.0.conv1 has 32"),
    ],
)
def test_what_can_not_be_had_is_refused_in_one_line(groups: Groups, asked: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said) as caught:
        control(groups, **asked)
    assert "\n" not in str(caught.value)
