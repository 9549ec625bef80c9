"""Transformers cut out of one export: heads, packed projections, tables and scales per head, removed branches."""

from __future__ import annotations

from collections import Counter

import onnx
import pytest
import torch

from passdeploy.export import OnnxSlicer, export_model, onnx_function
from passdeploy.groups import find_groups
from passdeploy.groups.check import random_structure
from passdeploy.structure import Structure
from passdeploy.surgery import relative_difference, thin
from tests.groups.nets import ready
from tests.groups.test_attention import NETWORKS, SIZES


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
