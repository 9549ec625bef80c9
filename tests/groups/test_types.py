from __future__ import annotations

import pytest
import torch

from passdeploy.errors import BadInput
from passdeploy.groups import Groups, find_groups
from passdeploy.structure import Structure
from tests.groups.nets import MadeUp, ready


@pytest.fixture(scope="module")
def groups() -> Groups:
    return find_groups(ready(MadeUp()), torch.rand(1, 3, 48, 40))


def test_dense(groups: Groups) -> None:
    assert groups.dense().widths() == groups.units


def test_masks_inside_a_removed_branch_mean_nothing(groups: Groups) -> None:
    depth = next(group for group in groups.groups if group.kind == "depth")
    assert groups.inner(depth) == ("block.conv1", "block.se.fc.0")
    removed = dict(groups.dense().masks) | {"depth:block": (False,)}
    emptied = removed | {"block.conv1": (False,) * 16}
    assert groups.canonical(Structure(emptied)).digest() == groups.canonical(Structure(removed)).digest()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stem": (False,) * 8}, "group 'stem' keeps no unit; keep at least one"),
        ({"stem": (True,) * 9}, "group 'stem' has 9 units, the network's has 8"),
        ({"stam": (True,) * 8}, "the network has no group 'stam'; did you mean stem"),
    ],
)
def test_structures_of_another_network(groups: Groups, change: dict[str, tuple[bool, ...]], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        groups.canonical(Structure(dict(groups.dense().masks) | change))


def test_a_missing_group(groups: Groups) -> None:
    masks = {name: mask for name, mask in groups.dense().masks.items() if name != "mix"}
    with pytest.raises(BadInput, match="group 'mix' is missing"):
        groups.check(Structure(masks))
