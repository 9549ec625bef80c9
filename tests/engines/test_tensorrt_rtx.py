"""TensorRT-RTX compiles for GPUs that are not here; without one its engines can't be loaded, only built and refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from passdeploy.engines._trt import Options, capabilities
from passdeploy.engines._turing import without_products
from passdeploy.engines.base import CompileInput, Engine, get_backend, require
from passdeploy.engines.files import load_engine
from passdeploy.engines.tensorrt_rtx import KNOWN, TensorRtRtx
from passdeploy.errors import BadInput, Unavailable
from passdeploy.export import export_onnx
from passdeploy.targets import Target, attached_gpus
from tests.engines.conftest import A100, Case, difference

RTX = TensorRtRtx()
pytestmark = pytest.mark.skipif(RTX.available(A100) is not None, reason=f"tensorrt_rtx: {RTX.available(A100)}")
without_gpu = pytest.mark.skipif(bool(attached_gpus()), reason="about machines without a GPU")


def test_the_known_capabilities_are_the_librarys() -> None:
    import tensorrt_rtx

    members = {name for name in tensorrt_rtx.ComputeCapability.__members__ if name.startswith("SM")}
    assert members == {f"SM{major}{minor}" for major, minor in KNOWN}


@pytest.mark.parametrize("capability", KNOWN, ids=lambda c: f"SM{c[0]}{c[1]}")
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_builds_for_every_gpu_it_knows(case: Case, precision: str, capability: tuple[int, int]) -> None:
    target = replace(A100, precision=precision, compute_capability=f"{capability[0]}.{capability[1]}")
    engine = RTX.compile(case.source, target)
    assert engine.suffix == ".tensorrt_rtx" and len(engine.data) > 10_000
    assert engine.meta["compute_capabilities"] == [target.compute_capability]
    assert engine.meta["precision"] == precision
    assert engine.meta["tf32"] is False  # float32 must mean float32
    assert engine.meta["version"] == RTX.version()


def test_the_graph_for_turing_computes_the_same(case: Case) -> None:
    """Its matrix products are written as convolutions, since TensorRT-RTX has no float32 product for Turing."""
    import onnx
    import onnxruntime as ort

    plain = RTX.graph_for(case.source, replace(A100, precision="fp32"))
    turing = RTX.graph_for(case.source, replace(A100, precision="fp32", compute_capability="7.5"))
    kinds = [[n.op_type for n in onnx.load_model_from_string(data).graph.node] for data in (plain, turing)]
    assert "Gemm" in kinds[0] and "Gemm" not in kinds[1] and "MatMul" not in kinds[1]
    session = ort.InferenceSession(turing, providers=["CPUExecutionProvider"])
    logits = np.concatenate([session.run(None, {"images": image[None]})[0] for image in case.images])
    assert difference(case.logits, logits) <= 1e-5


class Attention(torch.nn.Module):
    """Two heads over the pixels of a shrunken image: products of activations, and of constants, in three ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = torch.nn.Conv2d(3, 8, 4, stride=4)
        self.qkv, self.out = torch.nn.Linear(8, 24), torch.nn.Linear(8, 5, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).reshape(1, 16, 3, 2, 4).permute(2, 0, 3, 1, 4)
        mixed = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).reshape(1, 16, 8).mean(1))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_attention_builds_for_turing_too(tmp_path: Path, precision: str) -> None:
    import onnxruntime as ort

    torch.manual_seed(0)
    model, images = Attention().eval(), torch.rand(4, 3, 16, 16)
    path = export_onnx(model, tmp_path / "model.onnx", (3, 16, 16))
    source = CompileInput(path, samples=images.numpy())
    turing = replace(A100, precision=precision, compute_capability="8.0" if precision == "bf16" else "7.5")
    assert RTX.compile(source, turing).data
    if precision == "fp32":
        session = ort.InferenceSession(RTX.graph_for(source, turing), providers=["CPUExecutionProvider"])
        with torch.no_grad():
            assert difference(model(images[:1]).numpy(), session.run(None, {"images": images[:1].numpy()})[0]) <= 1e-5


@pytest.mark.parametrize(
    ("precision", "capability", "builds"),
    [("bf16", "8.0", True), ("bf16", "7.5", False), ("fp8", "8.9", True), ("fp8", "12.0", True), ("fp8", "8.0", False)],
)
def test_precisions_that_not_every_gpu_has(case: Case, precision: str, capability: str, builds: bool) -> None:
    target = replace(A100, precision=precision, compute_capability=capability)
    if builds:
        assert RTX.compile(case.source, target).data
        return
    with pytest.raises(Unavailable) as error:
        RTX.compile(case.source, target)
    assert f"{precision} needs compute capability" in str(error.value) and "--precision fp16" in str(error.value)


def test_several_capabilities_in_one_engine_and_back_from_the_disk(case: Case, tmp_path: Path) -> None:
    target = replace(A100, compute_capability="8.0, 8.6,8.9")
    engine = RTX.compile(case.source, target)
    assert engine.meta["compute_capabilities"] == ["8.0", "8.6", "8.9"]
    path = RTX.save(engine, tmp_path)
    assert path.name == "engine.tensorrt_rtx" and load_engine(path) == engine


def test_half_is_smaller_than_single(case: Case) -> None:
    sizes = {p: len(RTX.compile(case.source, replace(A100, precision=p)).data) for p in ("fp32", "fp16")}
    assert sizes["fp16"] < sizes["fp32"]


def test_a_dynamic_batch_axis_builds_with_a_profile(case: Case, tmp_path: Path) -> None:
    import onnx

    model = onnx.load(case.onnx)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    for node in model.graph.node:
        assert node.op_type != "Reshape"  # else the batch is written into the graph
    onnx.save(model, tmp_path / "dynamic.onnx")
    source = replace(case.source, onnx=tmp_path / "dynamic.onnx")
    engine = RTX.compile(source, replace(A100, batch=4), Options(max_batch=16))
    assert engine.meta["inputs"]["images"] == [-1, 3, 16, 16] and engine.meta["max_batch"] == 16


@without_gpu
@pytest.mark.parametrize("capability", ["9.0", "10.0", "8.0,9.0"])
def test_a_gpu_it_does_not_name_must_be_attached(capability: str) -> None:
    h100 = replace(A100, name="h100", device="NVIDIA H100", compute_capability=capability)
    with pytest.raises(Unavailable) as error:
        require(RTX, h100)
    text = str(error.value)
    assert "cannot compile for compute capability" in text and "NVIDIA H100" in text and "\n" not in text
    assert RTX.job(replace(h100, attached=True)) == {"compute_capabilities": "current"}


@without_gpu
def test_compiling_for_the_current_gpu_without_one_is_one_line(case: Case) -> None:
    here = replace(A100, compute_capability="9.0", attached=True)
    with pytest.raises(BadInput) as error:
        RTX.compile(case.source, here)
    assert "TensorRT-RTX: build for a100 failed" in str(error.value) and "\n" not in str(error.value)
    assert "CUDA driver version" in str(error.value)


@pytest.mark.parametrize("text", ["8", "8.0.1", "eight", "", "8.0,,9"])
def test_malformed_capabilities(text: str) -> None:
    with pytest.raises(BadInput, match=r"expected major\.minor"):
        capabilities(replace(A100, compute_capability=text))


def test_a_cpu_is_no_target() -> None:
    with pytest.raises(Unavailable, match="not for a CPU"):
        require(RTX, replace(A100, compute_capability=None))


@pytest.fixture(scope="module")
def built(case: Case) -> Engine:
    return RTX.compile(case.source, A100)


@without_gpu
def test_running_says_that_there_is_no_gpu(built: Engine) -> None:
    assert "no NVIDIA A100 is attached" in str(RTX.runnable(A100))
    with pytest.raises(Unavailable, match="no NVIDIA A100 is attached"):
        RTX.runner(built, A100)
    with pytest.raises((Unavailable, BadInput)) as error:  # a wrong "attached" gets as far as the driver
        RTX.runner(built, replace(A100, attached=True))
    assert "cuda" in str(error.value).lower() and "\n" not in str(error.value)
    assert RTX._server is None  # the child was ended


@pytest.mark.parametrize(
    ("meta", "target", "said"),
    [
        ({}, replace(A100, compute_capability="8.6", name="a10"), "compiled for compute capability 8.0, a10 has 8.6"),
        ({"version": "1.0.0"}, A100, "made by TensorRT-RTX 1.0.0"),
        ({}, replace(A100, precision="fp32"), "compiled for precision fp16"),
        ({}, replace(A100, batch=2), "compiled for batch 1"),
    ],
)
def test_an_engine_that_does_not_fit_is_refused_before_it_is_loaded(
    built: Engine, meta: dict[str, str], target: object, said: str
) -> None:
    engine = replace(built, data=b"never looked at", meta={**built.meta, **meta})
    with pytest.raises(BadInput, match=said) as error:
        RTX.runner(engine, target)  # type: ignore[arg-type]
    assert "compile it again" in str(error.value)


@pytest.mark.parametrize(
    ("options", "made", "target", "refused"),
    [
        ({"hardware_compatible": True}, {}, replace(A100, compute_capability="9.0"), None),
        ({"hardware_compatible": True}, {}, replace(A100, compute_capability="7.5"), "compiled for compute capability"),
        ({"version_compatible": True}, {"version": "1.0.0"}, A100, None),
        ({"version_compatible": True}, {"version": "999.0.0"}, A100, "made by TensorRT-RTX 999.0.0"),
    ],
)
def test_how_far_a_compatible_engine_goes(
    built: Engine, options: dict[str, bool], made: dict[str, str], target: Target, refused: str | None
) -> None:
    """Up to newer GPUs and libraries, never to older ones; what is let through ends at the missing GPU."""
    meta = {**built.meta, **made, "options": {**built.meta["options"], **options}}
    with pytest.raises((BadInput, Unavailable)) as error:
        RTX.runner(replace(built, meta=meta), replace(target, attached=False))
    assert (refused or "is attached to this machine") in str(error.value)


@pytest.mark.parametrize("options", [Options(version_compatible=True), Options(hardware_compatible=True)])
def test_options_of_full_tensorrt_are_refused(case: Case, options: Options) -> None:
    with pytest.raises(BadInput, match="are options of full TensorRT"):
        RTX.compile(case.source, A100, options)


def test_a_custom_operator_is_one_line(case: Case, tmp_path: Path) -> None:
    """TensorRT-RTX has no plugins; the message must name the operator."""
    import onnx

    model = onnx.load(case.onnx)
    node = next(node for node in model.graph.node if node.op_type == "Relu")
    node.op_type, node.domain = "MaskedAffine", "passdeploy"
    model.opset_import.append(onnx.helper.make_opsetid("passdeploy", 1))
    onnx.save(model, tmp_path / "custom.onnx")
    with pytest.raises(BadInput) as error:
        RTX.compile(replace(case.source, onnx=tmp_path / "custom.onnx"), replace(A100, precision="fp32"))
    assert "MaskedAffine" in str(error.value) and "\n" not in str(error.value)


def test_full_tensorrt_says_what_is_missing_or_that_it_needs_the_gpu() -> None:
    backend = get_backend("tensorrt")
    reason = backend.available(replace(A100, backend="tensorrt"))
    assert reason and ("libraries are not installed; pip install" in reason or "no NVIDIA A100 is attached" in reason)


def test_a_product_whose_left_side_is_constant_is_none_for_turing() -> None:
    """Of graphs that were cut shapes are inferred, and inference names none of initialisers."""
    rows = np.random.default_rng(0).random((3, 5), dtype=np.float32)
    given = helper.make_tensor_value_info("images", TensorProto.FLOAT, [2, 5, 4])
    made = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [2, 3, 4])
    node = helper.make_node("MatMul", ["rows", "images"], ["logits"])
    graph = helper.make_graph([node], "left", [given], [made], [numpy_helper.from_array(rows, "rows")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    turing = without_products(model.SerializeToString())
    assert "MatMul" not in {n.op_type for n in onnx.load_model_from_string(turing).graph.node}
    images = np.random.default_rng(1).random((2, 5, 4), dtype=np.float32)
    session = ort.InferenceSession(turing, providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"images": images})[0], rows @ images, rtol=1e-5)
