"""Batch norms with fixed statistics that libraries keep as buffers are cut like any other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from passdeploy._torchvision import torchvision
from passdeploy.data.base import Preprocess
from passdeploy.errors import BadInput
from passdeploy.export import OnnxSlicer, export_model, onnx_function
from passdeploy.groups import find_groups
from passdeploy.groups.check import calibrate, random_structure, randomise
from passdeploy.groups.frozen import is_frozen_norm, thaw
from passdeploy.kernels.masked_forward import masked_network
from passdeploy.search.prompt import InputStage, Prompted
from passdeploy.structure import Structure
from passdeploy.surgery import put_back, relative_difference, thin
from tests.groups.nets import cut_and_built_anew, ready

SHAPE = (3, 32, 32)
Norm = Callable[[int], nn.Module]


def _frozen(channels: int) -> nn.Module:
    norm: nn.Module = torchvision().ops.FrozenBatchNorm2d(channels)
    return norm


def _resnet(norm: Norm = _frozen) -> nn.Module:
    models = torchvision().models.resnet
    network: nn.Module = models.ResNet(models.BasicBlock, [1, 2, 1, 1], num_classes=5, norm_layer=norm)
    return network


def _mobilenet(norm: Norm = _frozen) -> nn.Module:
    network: nn.Module = torchvision().models.mobilenet_v2(width_mult=0.25, num_classes=5, norm_layer=norm)
    return network


NETWORKS = {"resnet": _resnet, "mobilenet": _mobilenet}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("plain", [False, True])
def test_a_frozen_norm_cannot_be_masked_in_an_engine_and_is_named(name: str, plain: bool) -> None:
    """Removed blocks are multiplied by zero in the norm, whose scale is a constant of the traced network."""
    network = ready(NETWORKS[name]())
    groups = find_groups(network, torch.rand(1, *SHAPE))
    model = Prompted(InputStage(Preprocess(size=SHAPE[1:])), network).eval()
    with pytest.raises(BadInput, match=r"--masked: network\..* is a constant of the network \(a frozen norm's\)"):
        masked_network(model, groups, random_structure(groups, 3), "network.", plain=plain)


@pytest.mark.parametrize("name", NETWORKS)
def test_frozen_norms_are_cut_like_batch_norms(name: str) -> None:
    torch.manual_seed(0)
    model, images = ready(NETWORKS[name]()), torch.rand(2, *SHAPE)
    calibrate(model, SHAPE)
    groups = find_groups(model, images[:1])
    plain = find_groups(ready(NETWORKS[name](nn.BatchNorm2d)), images[:1], check=False)
    assert groups.units == plain.units
    assert [g.members for g in groups.groups] == [g.members for g in plain.groups]
    assert set(groups.frozen) == set(plain.frozen)
    smallest = Structure({g.name: (True,) + (False,) * (g.units - 1) for g in groups.groups})
    blockless = {n: m if not n.startswith("depth:") else (False,) for n, m in groups.dense().masks.items()}
    for structure in (smallest, Structure(blockless), *(random_structure(groups, seed) for seed in range(2))):
        cut = cut_and_built_anew(model, NETWORKS[name](), groups, structure, images)
        assert not any(isinstance(module, nn.BatchNorm2d) for module in cut.modules())
        back = put_back(model, groups, structure, cut)
        assert all(torch.equal(value, back[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", NETWORKS)
def test_frozen_norms_are_cut_out_of_one_export(name: str) -> None:
    torch.manual_seed(0)
    model, images = ready(NETWORKS[name]()), torch.rand(1, *SHAPE)
    calibrate(model, SHAPE)
    groups = find_groups(model, images, check=False)
    kinds = {node.op_type for node in export_model(model, SHAPE).graph.node}
    assert not kinds & {"Mul", "BatchNormalization"}  # they have become part of the convolutions
    cutter = OnnxSlicer(model, groups, SHAPE, prefix="")
    assert cutter.exact, cutter.reason
    blockless = {n: m if not n.startswith("depth:") else (False,) for n, m in groups.dense().masks.items()}
    for structure in (Structure(blockless), groups.dense(), random_structure(groups, 1)):
        with torch.no_grad():
            expected = thin(model, groups, structure)(images)
        got = torch.from_numpy(onnx_function(cutter.slice(structure))(images.numpy()))
        assert relative_difference(expected, got) <= 1e-4


def test_calibration_reaches_frozen_norms_and_leaves_them_what_they_are() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), _frozen(4), nn.ReLU())
    with torch.no_grad():
        model[0].weight.mul_(1e4)
    calibrate(model, (3, 8, 8))
    assert is_frozen_norm(model[1])
    assert not list(model[1].parameters())
    with torch.no_grad():
        assert float(model(torch.rand(8, 3, 8, 8)).mean()) < 3
    before = {name: value.clone() for name, value in model[1].state_dict().items()}
    randomise(model)
    assert not any(torch.equal(value, before[name]) for name, value in model[1].state_dict().items())


class FrozenBatchNorm2d(torchvision().ops.FrozenBatchNorm2d):  # type: ignore[misc]
    """Called like the others, but the channels' order is another one behind it."""

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = super().forward(x).flip(1)
        return result


def test_a_norm_that_computes_something_else_is_left_alone() -> None:
    torch.manual_seed(0)
    model = ready(
        nn.Sequential(
            nn.Conv2d(3, 6, 3), FrozenBatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3), _frozen(8), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
        )
    )  # fmt: skip
    images = torch.rand(1, 3, 12, 12)
    assert list(thaw(nn.Sequential(FrozenBatchNorm2d(6), _frozen(6)))) == ["1"]
    groups = find_groups(model, images)
    assert groups.names == ("3",)
    assert "0" in groups.frozen
    with torch.no_grad():
        got = torch.from_numpy(onnx_function(export_model(model, (3, 12, 12)).SerializeToString())(images.numpy()))
        assert relative_difference(model(images), got) <= 1e-4
