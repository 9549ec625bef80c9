"""The mask kernel's TensorRT plugin, as far as it goes without TensorRT: graph, PTX, launch, registration."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from passdeploy.engines import _trt, _trt_plugin
from passdeploy.engines._convert import to_half
from passdeploy.engines._plugin_graph import NAME, NAMESPACE, plugin_name, with_plugin
from passdeploy.engines.base import CompileInput, get_backend
from passdeploy.errors import Unavailable
from passdeploy.export import export_model
from passdeploy.groups import find_groups
from passdeploy.groups.check import random_structure
from passdeploy.kernels.geometry import ACTIVATIONS
from passdeploy.kernels.masked_forward import masked_network
from passdeploy.surgery import thin
from tests.engines.conftest import A100, difference
from tests.scripted import tiny_resnet

SHAPE = (3, 16, 12)


class masked_affine_act_none(OpRun):
    """What the plugin computes, in numpy; the evaluator finds it by its name."""

    op_domain = NAMESPACE

    def _run(  # type: ignore[override]
        self, x: Any, mask: Any, scale: Any, shift: Any, plugin_namespace: str, plugin_version: str
    ) -> tuple[Any]:
        assert (plugin_namespace, plugin_version, mask.dtype) == (NAMESPACE, "1", np.float32)
        z = x * (mask * scale)[:, None, None] + shift[:, None, None]
        return (self.activated(z).astype(x.dtype),)

    def activated(self, z: Any) -> Any:
        return z


class masked_affine_act_relu(masked_affine_act_none):
    def activated(self, z: Any) -> Any:
        return np.maximum(z, 0)


@pytest.fixture(scope="module")
def graphs() -> tuple[bytes, np.ndarray, np.ndarray]:
    """A masked network as ONNX, images, and what the thin network says of them."""
    torch.manual_seed(0)
    network, images = tiny_resnet().eval(), torch.rand(1, *SHAPE)
    groups = find_groups(network, images)
    structure = random_structure(groups, 2)
    data = export_model(masked_network(network, groups, structure, plain=True), SHAPE).SerializeToString()
    with torch.no_grad():
        return data, images.numpy(), thin(network, groups, structure).eval()(images).numpy()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_graph_with_plugins_computes_the_thin_network(
    graphs: tuple[bytes, np.ndarray, np.ndarray], precision: str
) -> None:
    data, images, expected = graphs
    data = data if precision == "fp32" else to_half(data, precision)
    model = onnx.load_model_from_string(with_plugin(data))
    kinds = [node.op_type for node in model.graph.node]
    before = [node.op_type for node in onnx.load_model_from_string(data).graph.node]
    fused = kinds.count(plugin_name("relu"))
    assert fused + kinds.count(plugin_name("none")) >= 10 and fused >= 5
    assert kinds.count("Relu") == before.count("Relu") - fused
    (logits,) = ReferenceEvaluator(model, new_ops=[masked_affine_act_none, masked_affine_act_relu]).run(
        None, {"images": images}
    )
    assert difference(expected, logits) <= (1e-4 if precision == "fp32" else 2e-2)


def test_a_graph_without_masks_stays_as_it_is() -> None:
    data = export_model(tiny_resnet().eval(), SHAPE).SerializeToString()
    model = onnx.load_model_from_string(with_plugin(data))
    assert [n.op_type for n in model.graph.node] == [n.op_type for n in onnx.load_model_from_string(data).graph.node]


def test_the_entry_takes_inputs_then_numbers_then_the_output() -> None:
    """TensorRT's order; the emulator runs the same entry in tests/kernels."""
    try:
        text = _trt_plugin.ptx(80).decode()
    except Unavailable as error:
        pytest.skip(str(error))
    assert ".target sm_80" in text
    for kind in ("f32", "f16", "bf16"):
        entry = re.search(rf"\.entry {NAME}_flat_{kind}\((.*?)\)", text, re.DOTALL)
        assert entry is not None
        widths = [int(width) for width in re.findall(r"\.param \.[ub](\d+)", entry[1])]
        assert widths == [64] * 4 + [32] * 4 + [64]


def test_the_launch_is_the_kernels_own() -> None:
    assert _trt_plugin.launch((2, 5, 7, 7), "f16", 1) == (f"{NAME}_flat_f16", 1, 256, (490, 5, 49, 1))
    _, blocks, threads, numbers = _trt_plugin.launch((64, 64, 112, 112), "f32", 0)
    assert numbers == (64 * 64 * 112 * 112, 64, 112 * 112, 0)
    assert (blocks - 1) * threads * 2 * 4 < numbers[0] <= blocks * threads * 2 * 4, "two packets of four a thread"


def test_what_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decorators get functions of the documented shape; a stand-in notes them, since the library can't be had."""
    found: dict[str, Any] = {}
    trt, trtp = ModuleType("tensorrt"), ModuleType("tensorrt.plugin")
    kinds = {"float32": object(), "float16": object(), "bfloat16": object()}
    vars(trt).update(kinds, plugin=trtp)

    class Exprs(list[Any]):
        def __init__(self, count: int) -> None:
            super().__init__([None] * count)

    vars(trtp).update(
        TensorDesc=type("TensorDesc", (), {}), KernelLaunchParams=SimpleNamespace, SymExprs=list, SymIntExprs=Exprs,
        SymInt32=lambda value: ("int32", value),
        register=lambda name: lambda function: found.setdefault(f"register {name}", function),
        aot_impl=lambda name: lambda function: found.setdefault(f"aot_impl {name}", function),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", trtp)
    monkeypatch.setattr(_trt_plugin, "ptx", lambda capability: b"ptx %d" % capability)
    _trt_plugin.register(90)
    names = [f"{NAMESPACE}::{plugin_name(activation)}" for activation in ACTIVATIONS]
    assert sorted(found) == sorted(f"{what} {name}" for what in ("aot_impl", "register") for name in names)
    for number, name in enumerate(names):
        describe, implement = found[f"register {name}"], found[f"aot_impl {name}"]
        tensors = list(describe.__annotations__.items())[:-1]
        # Types, not their names, and plain ones: Python 3.13 refuses `issubclass` of a generic alias.
        assert len(tensors) == 4 and all(kind is vars(trtp)["TensorDesc"] for _, kind in tensors)
        assert list(implement.__annotations__.items())[:4] == tensors
        x = SimpleNamespace(shape=(1, 16, 16, 12), dtype=kinds["float16"])
        entry, code, params, extra = implement(x, None, None, None, (None,), 0)
        assert (entry, code) == (f"{NAME}_flat_f16", b"ptx 90")
        assert (params.grid_x, params.block_x, params.shared_mem) == (1, 256, 0)
        assert extra == [("int32", value) for value in (16 * 16 * 12, 16, 16 * 12, number)]


@pytest.mark.parametrize(("precision", "plugin"), [("fp16", True), ("int8", False)])
def test_the_plugin_is_said_to_be_where_it_is(
    graphs: tuple[bytes, np.ndarray, np.ndarray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    plugin: bool,
) -> None:
    """In a quantised graph there is none, and none is registered."""
    backend, target, jobs = get_backend("tensorrt"), A100.with_(precision=precision), []
    path = tmp_path / "masked.onnx"
    path.write_bytes(graphs[0])

    def build(child: str, job: dict[str, Any], *_: object, **__: object) -> dict[str, Any]:
        kinds = [node.op_type for node in onnx.load(job["onnx"]).graph.node]
        jobs.append((plugin_name("relu") in kinds, job["plugin_for"]))
        Path(job["engine"]).write_bytes(b"engine")
        return {"library": "11", "seconds": 0.0, "tf32": False}

    monkeypatch.setattr(_trt, "run_job", build)
    monkeypatch.setattr(_trt, "require", lambda *_: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    images = np.repeat(graphs[1], 4, axis=0)
    backend.compile(CompileInput(path, samples=images, masked=True), target)
    assert jobs == [(plugin, 80 if plugin else None)]
    assert backend.masks_by_kernel(target) is plugin
    assert get_backend("inductor").masks_by_kernel(target) and not get_backend("onnxruntime").masks_by_kernel(target)


def test_it_imports_without_tensorrt(tmp_path: Path) -> None:
    assert importlib.import_module("passdeploy.engines._trt_plugin").plugin_name("relu") == f"{NAME}_relu"
