from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from passdeploy.errors import BadInput
from passdeploy.groups import Groups, find_groups
from passdeploy.groups.check import masked_against_thin, random_structure
from passdeploy.models import build
from passdeploy.onnx_cut import cut_array
from passdeploy.structure import Structure
from passdeploy.surgery import apply_architecture, architecture, relative_difference, thin
from tests.groups.nets import MadeUp, Mixed, ready

IMAGES = torch.rand(2, 3, 48, 40, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def made_up() -> tuple[nn.Module, Groups]:
    model = ready(MadeUp())
    return model, find_groups(model, IMAGES[:1])


@pytest.mark.parametrize("seed", range(6))
def test_a_fresh_model_takes_the_weights_through_json(made_up: tuple[nn.Module, Groups], seed: int) -> None:
    model, groups = made_up
    arch = json.loads(json.dumps(architecture(groups, random_structure(groups, seed))))
    cut = apply_architecture(model, arch)
    again = apply_architecture(MadeUp().eval(), arch)
    again.load_state_dict(cut.state_dict())
    assert torch.equal(cut(IMAGES), again(IMAGES))


def test_attributes_stay_true(made_up: tuple[nn.Module, Groups]) -> None:
    model, groups = made_up
    cut = thin(model, groups, random_structure(groups, 1, skip=0))
    for module in cut.modules():
        if isinstance(module, nn.ConvTranspose2d):
            assert module.weight.shape[:2] == (module.in_channels, module.out_channels // module.groups)
        elif isinstance(module, nn.Conv2d):
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels // module.groups)
        elif isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features)
        elif isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert len(module.running_mean) == len(module.weight) == module.num_features
        elif isinstance(module, nn.GroupNorm):
            assert len(module.weight) == module.num_channels
    assert sum(p.numel() for p in cut.parameters()) < 0.6 * sum(p.numel() for p in model.parameters())


def test_the_dense_model_is_not_changed(made_up: tuple[nn.Module, Groups]) -> None:
    model, groups = made_up
    before = model(IMAGES)
    thin(model, groups, random_structure(groups, 2))
    assert torch.equal(model(IMAGES), before)


def test_keeping_everything_changes_nothing(made_up: tuple[nn.Module, Groups]) -> None:
    model, groups = made_up
    assert torch.equal(thin(model, groups, groups.dense())(IMAGES), model(IMAGES))


def test_a_thin_model_can_be_pruned_again(made_up: tuple[nn.Module, Groups]) -> None:
    model, groups = made_up
    once = thin(model, groups, random_structure(groups, 3, keep=0.7, skip=0))
    again = find_groups(once, IMAGES[:1])
    assert again.names == groups.names
    assert masked_against_thin(once, again, random_structure(again, 4), IMAGES) <= 1e-4


def test_a_thin_model_trains(made_up: tuple[nn.Module, Groups]) -> None:
    model, groups = made_up
    cut = thin(model, groups, random_structure(groups, 5, skip=1.0)).train()
    cut(IMAGES).square().sum().backward()
    grads = {name: p.grad for name, p in cut.named_parameters()}
    assert all(grad is not None and bool(grad.isfinite().all()) for grad in grads.values())
    assert not any(name.startswith("block.conv") for name in grads)


def test_removed_resnet_blocks_leave_no_weights() -> None:
    model = build("resnet20", 10).eval()
    groups = find_groups(model, torch.rand(1, 3, 32, 32))
    masks = {name: (not name.startswith("depth:"),) * count for name, count in groups.units.items()}
    cut = thin(model, groups, Structure(masks))
    assert not any("layer1" in name or "layer3.2" in name for name, _ in cut.named_parameters())
    assert relative_difference(cut(torch.zeros(1, 3, 32, 32)), model(torch.zeros(1, 3, 32, 32))) < float("inf")


def _broken(arch: dict[str, Any], kind: str) -> dict[str, Any]:
    if kind == "schema":
        arch["schema"] = "passdeploy.structure/1"
    elif kind == "name":
        arch["modules"]["stemm"] = arch["modules"].pop("stem")
    elif kind == "size":
        arch["modules"]["stem"]["out"]["of"] = 16
    elif kind == "index":
        arch["modules"]["stem"]["out"]["kept"] = [0, 8]
    elif kind in ("real", "truth"):
        arch["modules"]["stem"]["out"]["kept"] = [0.0 if kind == "real" else False]
    elif kind == "empty":
        arch["modules"]["stem"]["out"]["kept"] = []
    elif kind == "missing":
        del arch["branches"]
    elif kind == "side":
        arch["modules"]["stem"]["up"] = arch["modules"]["stem"].pop("out")
    elif kind == "group":
        arch["modules"]["grouped.1"]["out"]["kept"] = [0, 1, 2, 3, 4]
    elif kind == "type":
        arch["modules"] = ["stem"]
    return arch


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("schema", "schema is 'passdeploy.structure/1', expected 'passdeploy.architecture/1'"),
        ("name", "there is no module 'stemm'; did you mean stem"),
        ("size", "stem has 8 out channels, the architecture was cut from 16"),
        ("index", "stem keeps out channels that are empty, repeated, unsorted or outside 0..7"),
        ("empty", "stem keeps out channels that are empty"),
        ("real", "stem keeps out channels that are no whole numbers"),
        ("truth", "stem keeps out channels that are no whole numbers"),
        ("missing", "malformed"),
        ("side", "stem has no side 'up'"),
        ("group", "grouped.1 a grouped convolution loses whole groups only"),
        ("type", "malformed"),
    ],
)
def test_an_architecture_that_does_not_fit(made_up: tuple[nn.Module, Groups], kind: str, message: str) -> None:
    model, groups = made_up
    arch = _broken(json.loads(json.dumps(architecture(groups, random_structure(groups, 6, skip=0)))), kind)
    with pytest.raises(BadInput, match=message) as caught:
        apply_architecture(model, arch)
    assert "\n" not in str(caught.value)


def test_relative_difference() -> None:
    a = torch.tensor([1.0, -4.0])
    assert relative_difference(a, a) == 0
    assert relative_difference(a, torch.tensor([1.0, -3.0])) == 0.25
    assert relative_difference(a, torch.tensor([1.0, float("nan")])) == float("inf")
    assert relative_difference(a, torch.zeros(3)) == float("inf")


def test_graphs_and_networks_are_cut_alike() -> None:
    """The arrays of an exported graph, against the parameters that surgery leaves: transposed, grouped, depthwise."""
    model = ready(MadeUp())
    groups = find_groups(model, torch.rand(1, 3, 48, 40))
    for seed in range(3):
        arch = architecture(groups, random_structure(groups, seed))
        cut = apply_architecture(model, arch)
        left = dict(cut.named_modules())
        compared = 0
        for name, entry in arch["modules"].items():
            if not isinstance(left.get(name), nn.modules.conv._ConvNd | nn.Linear):
                continue
            for kind, value in model.get_submodule(name).named_parameters():
                got = cut_array(value.detach().numpy(), kind, model.get_submodule(name), entry)
                assert np.array_equal(got, getattr(left[name], kind).detach().numpy()), (name, kind)
                compared += 1
        assert compared > 10


def test_stored_split_sizes_follow_the_cut() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Mixed(), nn.Conv2d(10, 2, 1), nn.AdaptiveAvgPool2d(1)).eval()
    images = torch.rand(2, 3, 8, 8)
    groups = find_groups(model, images[:1])
    assert {name.split(":")[0] for name in groups.names} == {"0", "1.a", "1.b"}
    for seed in range(4):
        structure = random_structure(groups, seed)
        assert masked_against_thin(model, groups, structure, images) <= 1e-5
        cut = thin(model, groups, structure)
        assert cut[1].splits == [cut[1]["a"].in_channels, cut[1]["b"].in_channels]
        assert thin(nn.DataParallel(model), groups, structure)[1].splits == cut[1].splits
    assert model[1].splits == [5, 3]
