"""Gated linear units and pixel shuffles, which give out another number of channels than they take."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from passdeploy.export import OnnxSlicer, onnx_function
from passdeploy.groups import find_groups
from passdeploy.groups.check import masked_against_thin, random_structure
from passdeploy.structure import Structure
from passdeploy.surgery import relative_difference, thin
from tests.groups.nets import cut_and_built_anew, ready

SHAPE = (3, 16, 16)


class Gates(nn.Module):
    """Gates behind a norm, behind and in front of a concatenation, over the features of tokens, and of a split."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.gate = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.GLU(1)
        self.b, self.c = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(14, 20, 3, stride=4)
        self.tokens, self.back, self.head = nn.Linear(10, 24), nn.Linear(12, 16), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.gate(self.norm(self.a(x)))
        x = F.glu(self.c(torch.cat([x, F.glu(self.b(x), 1)], 1)), dim=1)
        x = self.back(F.glu(self.tokens(x.flatten(2).transpose(1, 2))))
        return self.head(F.glu(x, -1).mean(1))


class Joined(nn.Module):
    """A gate over what a concatenation makes: its halves are other layers' channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 3), nn.Conv2d(3, 10, 3), nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c(F.glu(torch.cat([self.a(x), self.b(x)], 1), 1)).relu().mean((2, 3)))


class Shuffles(nn.Module):
    """Up and down by blocks of channels: with a norm behind, into a concatenation, into the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 6, 3, padding=1), nn.PixelUnshuffle(2)
        self.deep, self.norm = nn.Conv2d(24, 32, 3, padding=1), nn.BatchNorm2d(8)
        self.up, self.merge = nn.PixelShuffle(2), nn.Conv2d(14, 36, 3, stride=4, padding=1)
        self.head = nn.Linear(4 * 12 * 12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = F.relu(self.norm(self.up(self.deep(self.down(x)))))
        return self.head(F.pixel_shuffle(self.merge(torch.cat([y, x], 1)), 3).flatten(1))


NETWORKS = {"gates": Gates, "joined": Joined, "shuffles": Shuffles}
UNITS = {
    "gates": {"a": 8, "b": 6, "c": 10, "tokens": 12, "back": 8},
    "joined": {"a": 6, "b": 2, "c": 8},
    "shuffles": {"stem": 6, "deep": 8, "merge": 4},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_blocks_and_halves_go_together(name: str) -> None:
    torch.manual_seed(0)
    model, images = ready(NETWORKS[name]()), torch.rand(2, *SHAPE)
    groups = find_groups(model, images[:1])
    assert groups.units == UNITS[name], groups.frozen
    assert set(groups.frozen) == {"head"}
    smallest = Structure({g.name: (True,) + (False,) * (g.units - 1) for g in groups.groups})
    for structure in (smallest, *(random_structure(groups, seed) for seed in range(4))):
        cut_and_built_anew(model, NETWORKS[name](), groups, structure, images)


@pytest.mark.parametrize("name", NETWORKS)
def test_they_are_cut_out_of_one_export(name: str) -> None:
    torch.manual_seed(0)
    model, images = ready(NETWORKS[name]()), torch.rand(1, *SHAPE)
    groups = find_groups(model, images, check=False)
    cutter = OnnxSlicer(model, groups, SHAPE, prefix="")
    assert cutter.exact, cutter.reason
    smallest = Structure({g.name: (True,) + (False,) * (g.units - 1) for g in groups.groups})
    for structure in (smallest, groups.dense(), random_structure(groups, 1)):
        with torch.no_grad():
            expected = thin(model, groups, structure)(images)
        got = torch.from_numpy(onnx_function(cutter.slice(structure))(images.numpy()))
        assert relative_difference(expected, got) <= 1e-4


def test_which_channels_a_unit_owns() -> None:
    gates = {g.name: g for g in find_groups(ready(Gates()), torch.rand(1, *SHAPE), check=False).groups}
    of_a = {(m.module, m.side): m.channels[2] for m in gates["a"].members}
    assert of_a == {("a", "out"): (2, 10), ("norm", "out"): (2, 10), ("b", "in"): (2,), ("c", "in"): (2,)}
    assert {m.module: m.channels[2] for m in gates["b"].members} == {"b": (2, 8), "c": (10,)}
    shuffles = {g.name: g for g in find_groups(ready(Shuffles()), torch.rand(1, *SHAPE), check=False).groups}
    of_deep = {(m.module, m.side): m.channels[1] for m in shuffles["deep"].members}
    assert of_deep == {("deep", "out"): (4, 5, 6, 7), ("norm", "out"): (1,), ("merge", "in"): (1,)}
    of_stem = {(m.module, m.side): m.channels[1] for m in shuffles["stem"].members}
    assert of_stem == {("stem", "out"): (1,), ("deep", "in"): (4, 5, 6, 7), ("merge", "in"): (9,)}
    of_merge = {(m.module, m.side): m.channels[1] for m in shuffles["merge"].members}
    assert of_merge == {("merge", "out"): tuple(range(9, 18)), ("head", "in"): tuple(range(144, 288))}


class Sideways(nn.Module):
    """A gate over the columns of images, as many as there are channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(F.glu(self.a(x), 3)).relu().mean((2, 3)))


def test_a_gate_over_columns_is_never_taken_for_one_over_channels() -> None:
    torch.manual_seed(0)
    model, images = ready(Sideways()), torch.rand(2, *SHAPE)
    groups = find_groups(model, images[:1])
    assert "b" in groups.names
    for seed in range(4):
        assert masked_against_thin(model, groups, random_structure(groups, seed), images) <= 1e-4
