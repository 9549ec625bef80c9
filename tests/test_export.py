from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from passdeploy.data.base import Preprocess
from passdeploy.errors import BadInput
from passdeploy.export import OnnxSlicer, export_model, export_onnx, onnx_function
from passdeploy.groups import Groups, find_groups
from passdeploy.groups.check import random_structure
from passdeploy.models import build
from passdeploy.search.prompt import InputStage, Prompted
from passdeploy.structure import Structure
from passdeploy.surgery import relative_difference, thin
from tests.groups.nets import MadeUp, ready


def _prompted(network: nn.Module, size: tuple[int, int], kind: str = "additive") -> Prompted:
    stage = InputStage(Preprocess(size=size), kind, 2)
    if stage.prompt is not None:
        nn.init.uniform_(stage.prompt)
    return Prompted(stage, network).eval()


def _operators(proto: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in proto.graph.node]


@torch.no_grad()
def _difference(model: nn.Module, data: bytes, images: torch.Tensor) -> float:
    return relative_difference(model(images), torch.from_numpy(onnx_function(data)(images.numpy())))


@pytest.fixture(scope="module")
def resnet() -> tuple[nn.Module, Groups]:
    torch.manual_seed(0)
    network = ready(build("resnet20", 10))
    return network, find_groups(network, torch.rand(1, 3, 32, 32))


@pytest.fixture(scope="module")
def slicer(resnet: tuple[nn.Module, Groups]) -> OnnxSlicer:
    network, groups = resnet
    return OnnxSlicer(_prompted(network, (32, 32)), groups, (3, 32, 32), batch=2)


def test_the_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = _prompted(ready(MadeUp()), (48, 40), "expansive")
    path = export_onnx(model, tmp_path / "model.onnx", (3, 48, 40), batch=2)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    (given,), (returned,) = proto.graph.input, proto.graph.output
    assert (given.name, returned.name) == ("images", "logits")
    assert [d.dim_value for d in given.type.tensor_type.shape.dim] == [2, 3, 48, 40]
    assert given.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert [d.dim_value for d in returned.type.tensor_type.shape.dim] == [2, 3]
    assert _difference(model, path.read_bytes(), torch.rand(2, 3, 48, 40)) <= 1e-5
    assert str(Path.cwd()) not in path.read_bytes().decode("latin1")


def test_the_model_is_left_alone() -> None:
    model = _prompted(ready(MadeUp()), (48, 40)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export_model(model, (3, 48, 40))
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert isinstance(model.network.pool, nn.AdaptiveAvgPool2d)  # type: ignore[union-attr]
    assert all(p.requires_grad for p in model.parameters())


def test_what_cant_be_exported_is_one_line() -> None:
    class Unexportable(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if x.sum() > 0 else x

    with pytest.raises(BadInput, match="can't be exported to ONNX") as caught:
        export_model(Unexportable(), (3, 8, 8))
    assert "\n" not in str(caught.value)


def test_removed_blocks_leave_no_trace(resnet: tuple[nn.Module, Groups], slicer: OnnxSlicer) -> None:
    network, groups = resnet
    blocks = [name for name in groups.names if name.startswith("depth:")]
    structure = Structure(dict(groups.dense().masks) | dict.fromkeys(blocks, (False,)))
    exported = export_model(_prompted(thin(network, groups, structure), (32, 32)), (3, 32, 32), batch=2)
    # stem, then two projecting blocks of three convolutions, one addition and two activations each
    assert Counter(_operators(exported)) == {
        "Mul": 1, "Add": 1 + 2, "Conv": 1 + 6, "Relu": 1 + 4, "ReduceMean": 1, "Reshape": 1, "Gemm": 1
    }  # fmt: skip
    assert _operators(onnx.load_from_string(slicer.slice(structure))) == _operators(exported)


@pytest.mark.parametrize("seed", range(1))
def test_sliced_equals_exported(resnet: tuple[nn.Module, Groups], slicer: OnnxSlicer, seed: int) -> None:
    network, groups = resnet
    assert slicer.exact, slicer.reason
    structure = random_structure(groups, seed)
    model, images = slicer.model, torch.rand(2, 3, 32, 32)
    cut = Prompted(model.stage, thin(network, groups, structure))  # type: ignore[arg-type]
    exported = export_model(cut, (3, 32, 32), batch=2)
    sliced = onnx.load_from_string(slicer.slice(structure))
    onnx.checker.check_model(sliced, full_check=True)
    assert _operators(sliced) == _operators(exported)
    shapes = [sorted(tuple(i.dims) for i in proto.graph.initializer) for proto in (sliced, exported)]
    assert shapes[0] == shapes[1]
    assert _difference(cut, exported.SerializeToString(), images) <= 1e-5
    assert _difference(cut, slicer.slice(structure), images) <= 1e-5


def test_smallest_and_dense(resnet: tuple[nn.Module, Groups], slicer: OnnxSlicer) -> None:
    network, groups = resnet
    smallest = Structure({g.name: (True,) + (False,) * (g.units - 1) for g in groups.groups})
    images = torch.rand(2, 3, 32, 32)
    for structure in (smallest, groups.dense()):
        cut = Prompted(slicer.model.stage, thin(network, groups, structure))  # type: ignore[arg-type]
        assert _difference(cut, slicer.slice(structure), images) <= 1e-5


def test_fresh_networks_whose_tensors_are_all_alike() -> None:
    network = MadeUp().eval()
    for module in network.modules():
        if isinstance(bias := getattr(module, "bias", None), nn.Parameter):
            nn.init.zeros_(bias)
    network.grouped = nn.Sequential(*list(network.grouped)[:2])  # without the group norm: it can't be cut
    groups = find_groups(network, torch.rand(1, 3, 48, 40))
    cutter = OnnxSlicer(_prompted(network, (48, 40), "none"), groups, (3, 48, 40))
    assert cutter.exact, cutter.reason
    structure = random_structure(groups, 1)
    cut = _prompted(thin(network, groups, structure), (48, 40), "none")
    assert _difference(cut, cutter.slice(structure), torch.rand(1, 3, 48, 40)) <= 1e-4


def test_a_graph_that_cant_be_cut_is_exported_for_real() -> None:
    network = ready(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.Upsample(size=(9, 7)), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.Flatten(),
                      nn.Linear(6 * 63, 4))
    )  # fmt: skip
    images = torch.rand(1, 3, 12, 10)
    groups = find_groups(network, images)
    cutter = OnnxSlicer(network, groups, (3, 12, 10), prefix="")
    assert not cutter.exact
    assert cutter.reason == "a constant shape of Resize changes with the structure"
    structure = random_structure(groups, 2)
    assert _difference(thin(network, groups, structure), cutter.slice(structure), images) <= 1e-5


def test_adaptive_pools_that_do_not_divide() -> None:
    model = nn.Sequential(nn.AdaptiveAvgPool2d((7, 3)), nn.Conv2d(3, 2, 1))
    proto = export_model(model, (3, 5, 10))
    assert Counter(_operators(proto)) == {"MatMul": 2, "Conv": 1}
    assert _difference(model, proto.SerializeToString(), torch.rand(1, 3, 5, 10)) <= 1e-5


class _PoolByName(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pool, self.conv = nn.AdaptiveAvgPool2d((7, 3)), nn.Conv2d(3, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(self.pool(input=x))


def test_pools_may_be_called_by_name() -> None:
    model = _PoolByName()
    proto = export_model(model, (3, 5, 10))
    assert _difference(model, proto.SerializeToString(), torch.rand(1, 3, 5, 10)) <= 1e-5


def test_no_denormal_values(slicer: OnnxSlicer, resnet: tuple[nn.Module, Groups]) -> None:
    proto = onnx.load_from_string(slicer.slice(random_structure(resnet[1], 3)))
    for initializer in proto.graph.initializer:
        values = np.abs(onnx.numpy_helper.to_array(initializer))
        assert not ((values > 0) & (values < np.finfo(np.float32).tiny)).any(), initializer.name


def test_a_network_that_no_file_holds_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("passdeploy.onnx_export.LARGEST", 100)
    with pytest.raises(BadInput, match=r"can't be exported to ONNX: its weights take 0\.0 GiB in float32"):
        export_model(nn.Conv2d(3, 4, 3), (3, 8, 8))
