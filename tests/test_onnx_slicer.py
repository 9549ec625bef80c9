"""Transformers cut out of one export: heads, packed projections, tables and scales per head, removed branches."""

from __future__ import annotations

from collections import Counter
from typing import Any

import onnx
import pytest
import torch
from torch import nn

from passdeploy.export import OnnxSlicer, export_model, onnx_function
from passdeploy.groups import find_groups
from passdeploy.groups.check import random_structure
from passdeploy.structure import Structure
from passdeploy.surgery import relative_difference, thin
from tests.groups.nets import ready
from tests.groups.test_attention import NETWORKS, SIZES
from tests.groups.test_wrapped import Aliased


@pytest.mark.parametrize("name", ["own", "swin v2"])
def test_transformers_are_cut(name: str) -> None:
    torch.manual_seed(0)
    model, shape = ready(NETWORKS[name]()), (3, SIZES[name], SIZES[name])
    images = torch.rand(1, *shape)
    groups = find_groups(model, images)
    cutter = OnnxSlicer(model, groups, shape, prefix="")
    assert cutter.exact, cutter.reason
    smallest = {g.name: (True,) + (False,) * (g.units - 1) for g in groups.groups}
    blockless = {n: m if not n.startswith("depth:") else (False,) for n, m in groups.dense().masks.items()}
    structures = [Structure(smallest), Structure(blockless), groups.dense()]
    for structure in (*structures, *(random_structure(groups, seed) for seed in range(3))):
        with torch.no_grad():
            expected = thin(model, groups, structure)(images)
        got = torch.from_numpy(onnx_function(cutter.slice(structure))(images.numpy()))
        assert relative_difference(expected, got) <= 1e-4


def test_an_attention_exports_to_the_same_operators_with_and_without_all_heads() -> None:
    model = ready(NETWORKS["multihead"]())
    groups = find_groups(model, torch.rand(1, 3, 16, 16))
    masks = {n: m if n.startswith("depth:") else (False, *m[1:]) for n, m in groups.dense().masks.items()}
    cutter = OnnxSlicer(model, groups, (3, 16, 16), prefix="")
    assert cutter.exact, cutter.reason
    operators = [
        Counter(node.op_type for node in proto.graph.node)
        for proto in (
            export_model(model, (3, 16, 16)),
            export_model(thin(model, groups, Structure(masks)), (3, 16, 16)),
            onnx.load_from_string(cutter.slice(Structure(masks))),
        )
    ]
    assert operators[0] == operators[1] == operators[2]


def test_modules_of_two_names_are_cut() -> None:
    """Groups call them by the first, the exporter by the one under which they run."""
    torch.manual_seed(0)
    model, images = ready(Aliased()), torch.rand(1, 3, 12, 10)
    groups = find_groups(model, images)
    cutter = OnnxSlicer(model, groups, (3, 12, 10), prefix="")
    assert cutter.exact, cutter.reason
    blockless = {n: m if not n.startswith("depth:") else (False,) for n, m in groups.dense().masks.items()}
    for structure in (Structure(blockless), random_structure(groups, 0), random_structure(groups, 1, skip=0)):
        with torch.no_grad():
            expected = thin(model, groups, structure)(images)
        got = torch.from_numpy(onnx_function(cutter.slice(structure))(images.numpy()))
        assert relative_difference(expected, got) <= 1e-4


class Narrow(nn.Module):
    """A block of so few channels that chance may keep them all."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(6, 2, 3, padding=1), nn.Conv2d(2, 6, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.b(self.a(x).relu())


def test_all_that_can_be_cut_is_held_against_a_thin_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ready(nn.Sequential(nn.Conv2d(3, 6, 1), *(Narrow() for _ in range(6)), nn.Flatten(), nn.Linear(6 * 16, 3)))
    groups = find_groups(model, torch.rand(1, 3, 4, 4))
    real, held = OnnxSlicer._sliced, list[Any]()

    def sliced(self: OnnxSlicer, arch: Any) -> bytes:
        held.append(arch)
        return real(self, arch)

    monkeypatch.setattr(OnnxSlicer, "_sliced", sliced)
    assert OnnxSlicer(model, groups, (3, 4, 4), prefix="").exact
    sides = {
        (name, side)
        for arch in held
        for name, entry in arch["modules"].items()
        for side, cut in entry.items()
        if len(cut["kept"]) < cut["of"]
    }
    assert sides == {(m.module, m.side) for g in groups.groups for m in g.members}
    blocks = {g.name for g in groups.groups if g.kind == "depth"}
    gone = [{branch["name"] for branch in arch["branches"]} for arch in held]
    assert len(blocks) == 6 and set() in gone and blocks in gone


class Normalised(nn.Module):
    """Two residual branches, one ending in a norm that is its gate, with norms of groups and of single channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.GroupNorm(4, 12), nn.ReLU())
        self.first = nn.Sequential(
            nn.Conv2d(12, 8, 3, padding=1), nn.GroupNorm(4, 8), nn.ReLU(), nn.Conv2d(8, 12, 1), nn.GroupNorm(4, 12)
        )
        self.second = nn.Sequential(
            nn.Conv2d(12, 8, 3, padding=1), nn.InstanceNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1),
            nn.GroupNorm(2, 8, affine=False), nn.ReLU(), nn.Conv2d(8, 8, 1),
            nn.InstanceNorm2d(8, affine=True), nn.Conv2d(8, 12, 1),
        )  # fmt: skip
        self.head = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + self.first(x)
        x = x + self.second(x)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("fresh", [False, True])
def test_norms_of_groups_are_cut(fresh: bool) -> None:
    torch.manual_seed(0)
    model, shape = Normalised().eval() if fresh else ready(Normalised()), (3, 16, 16)
    images = torch.rand(1, *shape)
    groups = find_groups(model, images)
    cutter = OnnxSlicer(model, groups, shape, prefix="")
    assert cutter.exact, cutter.reason
    assert {g.gate for g in groups.groups if g.kind == "depth"} == {"first.4", "second.8"}
    blockless = {n: m if not n.startswith("depth:") else (False,) for n, m in groups.dense().masks.items()}
    smallest = {g.name: (True,) + (False,) * (g.units - 1) for g in groups.groups}
    for structure in (
        Structure(smallest),
        Structure(blockless),
        *(random_structure(groups, seed) for seed in range(3)),
    ):
        with torch.no_grad():
            expected = thin(model, groups, structure)(images)
        got = torch.from_numpy(onnx_function(cutter.slice(structure))(images.numpy()))
        assert relative_difference(expected, got) <= 1e-4
