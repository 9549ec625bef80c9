from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from passdeploy.groups import find_groups
from passdeploy.groups.check import masked_against_thin
from passdeploy.groups.depth import branches
from passdeploy.models import build
from passdeploy.structure import Structure
from passdeploy.surgery import Zero, relative_difference, thin
from tests.groups.nets import EvenSides, MadeUp, PreActivation, ready


def test_resnet_blocks_without_projection() -> None:
    found = {branch.name: branch for branch in branches(build("resnet18", 10))[0]}
    assert set(found) == {"layer1.0", "layer1.1", "layer2.1", "layer3.1", "layer4.1"}
    block = found["layer2.1"]
    assert block.modules == ("layer2.1.conv1", "layer2.1.bn1", "layer2.1.conv2", "layer2.1.bn2")
    assert (block.gate, block.starts) == ("layer2.1.bn2", ("layer2.1.conv1",))


def test_squeeze_and_excite_is_gated_before_the_product() -> None:
    (block,) = branches(ready(MadeUp()))[0]
    assert block.gate == "block.bn2"
    assert block.modules[-1] == "block.se.fc.2"


def test_nested_branches_share_nothing_with_the_outside() -> None:
    assert [b.gate for b in branches(ready(PreActivation()))[0]] == ["conv2"]


def test_a_removed_block_is_the_identity() -> None:
    model, images = ready(MadeUp()), torch.rand(2, 3, 48, 40)
    groups = find_groups(model, images[:1])
    masks = dict(groups.dense().masks) | {"depth:block": (False,)}
    removed = thin(model, groups, Structure(masks))
    model.block.forward = lambda x: x
    assert relative_difference(model(images), removed(images)) <= 1e-6


class _Shared(nn.Module):
    """The branch's features are read by a second head: the branch can't go."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.twice = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.a(x)
        x = (x + self.b(F.relu(y))) * y.mean()
        x = x + self.twice(x)
        return x + self.twice(x)


def test_a_branch_goes_with_the_untraceable_module_in_it() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.inner, self.last = nn.Conv2d(3, 4, 1), EvenSides(4), nn.Conv2d(4, 4, 1)
            self.fc = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.fc((x + self.last(self.inner(x))).mean((2, 3)))

    model, images = ready(Around()), torch.rand(2, 3, 8, 8)
    found, opaque = branches(model)
    assert [branch.modules for branch in found] == [("inner.a", "inner.b", "inner", "last")]
    assert set(opaque) == {"inner"}
    groups = find_groups(model, images[:1])
    assert groups.names[0] == "stem" and "inner.a" in groups.names
    dense = dict(groups.dense().masks)
    removed = Structure(dense | {n: (False,) for n in dense if n.startswith("depth:")})
    assert masked_against_thin(model, groups, removed, images) <= 1e-4
    assert not dict(thin(model, groups, removed).inner.named_parameters())


def test_options_of_forward_are_no_inputs() -> None:
    class WithMask(PreActivation):
        def forward(self, x: Tensor, mask: Tensor | None = None, scaled: bool = False) -> Tensor:
            x = self.stem(x)
            y = self.conv1(x) if mask is None else self.conv1(x) * mask
            x = x + (y * 2 if scaled else y)
            return self.fc(x.mean((2, 3)))

    assert [b.gate for b in branches(ready(WithMask()))[0]] == ["conv1"]


def test_what_is_used_elsewhere_is_no_branch() -> None:
    assert branches(_Shared().eval())[0] == []


class _Sigmoid(nn.Module):
    """The branch ends in a sigmoid: no module's zero output makes it zero."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return x + torch.sigmoid(self.a(x))


def test_a_branch_that_no_module_makes_zero() -> None:
    assert branches(_Sigmoid().eval())[0] == []


class _Concatenated(nn.Module):
    """Two paths side by side, joined by a convolution: zeros of the input's shape would not fit, a scalar zero does."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.left, self.right, self.join = nn.Conv2d(4, 3, 1), nn.Conv2d(4, 5, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.join(torch.cat([self.left(x), self.right(x)], 1))
        return self.fc(x.mean((2, 3)))


def test_parallel_paths_inside_a_branch() -> None:
    model, images = ready(_Concatenated()), torch.rand(2, 3, 6, 6)
    groups = find_groups(model, images[:1])
    (block,) = [group for group in groups.groups if group.kind == "depth"]
    assert (block.starts, block.zero) == (("left", "right"), "scalar")
    masks = dict(groups.dense().masks) | {block.name: (False,), "stem": (True, False, True, True)}
    assert masked_against_thin(model, groups, Structure(masks), images) <= 1e-6


class _Recurrent(nn.Module):
    """A layer in the branch returns two things, of which one is used; an identity in its place returns one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.lstm = nn.Conv2d(3, 6, 1), nn.LSTM(6, 6, batch_first=True)
        self.wide, self.back, self.fc = nn.Linear(6, 9), nn.Linear(9, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        y, _ = self.lstm(x)
        return self.fc((x + self.back(F.relu(self.wide(y)))).mean(1))


def test_a_batch_of_two_is_not_taken_for_a_pair() -> None:
    model = ready(_Recurrent())
    assert [branch.gate for branch in branches(model)[0]] == ["back"]
    groups = find_groups(model, torch.rand(2, 3, 4, 4))
    assert groups.names == ("wide",)
    (reason,) = (why for name, why in groups.frozen.items() if name.startswith("depth:"))
    assert "does not run without it: ValueError: too many values to unpack" in reason


class Layer(nn.Module):
    """A transformer's: two branches, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
        self.second = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.first(x)
        return x + self.second(x)


def test_two_branches_of_one_layer_have_names_of_their_own() -> None:
    model = nn.Sequential(nn.Flatten(2), Layer(), Layer(), nn.Flatten(), nn.Linear(3 * 8, 2))
    assert [b.name for b in branches(model)[0]] == ["1.first", "1.second", "2.first", "2.second"]


def test_a_zero_of_another_shape_has_the_rank_of_what_it_stands_for() -> None:
    """What drops branches per image asks for the first dimension."""
    assert Zero(like=False)(torch.rand(2, 4, 3, 3)).shape == (1, 1, 1, 1)


class _Prepared(nn.Module):
    """Adds as networks do that are meant to be quantised."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.fc = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1), nn.Conv2d(6, 4, 1), nn.Linear(4, 2)
        self.add = torch.ao.nn.quantized.FloatFunctional()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.fc(self.add.add(x, self.b(self.a(x).relu())).mean((2, 3)))


def test_additions_that_are_prepared_for_quantisation_are_ordinary_ones() -> None:
    network, images = ready(_Prepared()), torch.rand(2, 3, 6, 6)
    groups = find_groups(network, images[:1])
    assert sum(group.kind == "depth" for group in groups.groups) == 1
    masks = {group.name: tuple(i % 2 == 0 for i in range(group.units)) for group in groups.groups}
    assert masked_against_thin(network, groups, Structure(masks), images) <= 1e-5
