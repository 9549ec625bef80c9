"""Half-precision graphs without half-precision hardware: ONNX Runtime and onnx's reference run them on the CPU."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn

from passdeploy.engines import _convert
from passdeploy.engines._convert import KEEP, check_range, to_half
from passdeploy.engines._graph import input_stage
from passdeploy.errors import BadInput
from passdeploy.onnx_export import export_model
from tests.engines.conftest import Case, difference


def run(data: bytes, images: np.ndarray) -> np.ndarray:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"images": image[None]})[0] for image in images])


def test_fp16_is_as_close_as_fp16_gets(case: Case) -> None:
    logits = run(to_half(case.onnx.read_bytes(), "fp16"), case.images)
    assert 0 < difference(case.logits, logits) < 3e-3


def test_bf16_is_as_close_as_bf16_gets(case: Case) -> None:
    model = onnx.load_model_from_string(to_half(case.onnx.read_bytes(), "bf16"))
    logits = ReferenceEvaluator(model).run(None, {"images": case.images[:1]})[0]
    assert 0 < difference(case.logits[:1], logits) < 3e-2


@pytest.mark.parametrize(("precision", "kind"), [("fp16", TensorProto.FLOAT16), ("bf16", TensorProto.BFLOAT16)])
def test_what_is_half_and_what_is_not(case: Case, precision: str, kind: int) -> None:
    data = case.onnx.read_bytes()
    half = onnx.load_model_from_string(to_half(data, precision))
    for value in (*half.graph.input, *half.graph.output):
        assert value.type.tensor_type.elem_type == TensorProto.FLOAT
    assert [v.name for v in half.graph.output] == ["logits"]
    kinds = {tensor.name: tensor.data_type for tensor in half.graph.initializer}
    by_type: dict[str, set[int]] = {}
    stage = input_stage(half.graph)
    for node in half.graph.node:
        label = "stage" if node.name in stage and node.op_type != "Cast" else node.op_type
        by_type.setdefault(label, set()).update(kinds[name] for name in node.input if name in kinds)
    assert by_type["Conv"] == {kind} and by_type["Gemm"] == {kind}
    assert by_type["stage"] == {TensorProto.FLOAT} and by_type["LayerNormalization"] == {TensorProto.FLOAT}
    weights = sum(numpy_helper.to_array(t).nbytes for t in onnx.load_model_from_string(data).graph.initializer)
    assert sum(numpy_helper.to_array(t).nbytes for t in half.graph.initializer) < 0.75 * weights


def tiny(weight: float, ops: list[tuple[str, list[str], str]]) -> bytes:
    """A graph on (1, 3, 4, 4) with a 1x1 convolution of constant weight somewhere in it."""
    kernel = numpy_helper.from_array(np.full((3, 3, 1, 1), weight, np.float32), "w")
    nodes = [helper.make_node(kind, inputs, [output]) for kind, inputs, output in ops]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, 4, 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 3, 4, 4])],
        [kernel],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9).SerializeToString()


def test_a_weight_beyond_fp16_is_refused_and_bf16_takes_it() -> None:
    data = tiny(1e6, [("Conv", ["images", "w"], "logits")])
    with pytest.raises(BadInput, match=r"weight 'w' exceeds 65504; use --precision bf16"):
        to_half(data, "fp16")
    assert to_half(data, "bf16")


def test_an_output_that_is_also_used_inside_keeps_its_name() -> None:
    graph = onnx.load_model_from_string(tiny(0.5, [("Conv", ["images", "w"], "logits")])).graph
    graph.node.append(helper.make_node("Relu", ["logits"], ["second"]))
    graph.output.append(helper.make_tensor_value_info("second", TensorProto.FLOAT, [1, 3, 4, 4]))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    images = np.random.default_rng(0).normal(size=(1, 3, 4, 4)).astype(np.float32)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    data = to_half(model.SerializeToString(), "fp16")
    first, second = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"]).run(
        ["logits", "second"], {"images": images}
    )
    assert np.ptp(first) > 0
    np.testing.assert_allclose(second, np.maximum(first, 0), rtol=1e-3)


def in_half(data: bytes, images: np.ndarray) -> np.ndarray:
    """What a float16 graph gives where float16 is computed in float16: ONNX Runtime's CPU kernels widen it."""
    with np.errstate(all="ignore"):
        outputs: np.ndarray = ReferenceEvaluator(onnx.load_model_from_string(data)).run(None, {"images": images})[0]
    return outputs


L2 = [("Conv", ["images", "w"], "a"), ("ReduceL2", ["a"], "norm"), ("Div", ["a", "norm"], "logits")]


def test_squares_that_overflow_fp16_are_computed_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    data, images = tiny(200.0, L2), np.ones((1, 3, 4, 4), np.float32)
    np.testing.assert_allclose(in_half(to_half(data, "fp16"), images), run(data, images), rtol=2e-3)
    monkeypatch.setattr(_convert, "KEEP", KEEP - {"ReduceL2"})
    assert not in_half(to_half(data, "fp16"), images).any(), "in half the norm is infinite"


class MeanOfSquares(nn.Module):
    """A convolution, divided by the root of the mean of its squares: ConvNeXt's and RMS norms."""

    def __init__(self, power: bool) -> None:
        super().__init__()
        self.power = power
        self.conv = nn.Conv2d(3, 8, 1)
        with torch.no_grad():
            self.conv.weight.mul_(300)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        x = x - x.mean(1, keepdim=True)
        squares = x.pow(2) if self.power else x * x
        return (x * torch.rsqrt(squares.mean(1, keepdim=True) + 1e-6)).mean((2, 3))


@pytest.mark.parametrize("power", [True, False])
def test_means_of_squares_stay_in_fp32(power: bool) -> None:
    torch.manual_seed(0)
    data = export_model(MeanOfSquares(power), (3, 8, 8)).SerializeToString()
    images = 4 * np.random.default_rng(0).random((1, 3, 8, 8), dtype=np.float32)
    expected = run(data, images)
    np.testing.assert_allclose(in_half(to_half(data, "fp16"), images), expected, atol=1e-2 * np.abs(expected).max())


def test_values_that_leave_fp16_are_refused_and_named() -> None:
    data = tiny(1000.0, [("Conv", ["images", "w"], "a"), ("Conv", ["a", "w"], "b"), ("Relu", ["b"], "logits")])
    images = np.ones((5, 3, 4, 4), np.float32)
    half = to_half(data, "fp16")
    said = r"fp16: 'b' reaches 9e\+06 on validation images, half ends at 65504; use --precision bf16"
    with pytest.raises(BadInput, match=said):
        check_range(data, half, images)
    check_range(data, half, images * 0.001)


def test_a_graph_without_matrix_products_has_no_input_stage() -> None:
    model = onnx.load_model_from_string(tiny(1.0, [("Relu", ["images"], "a"), ("Neg", ["a"], "logits")]))
    assert input_stage(model.graph) == set()


class Guarded(nn.Module):
    """Divides zeros by a norm that a tiny number keeps above zero, as Swin v2 does with the keys of padded tokens."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (images + nn.functional.normalize(images * 0, dim=1, eps=1e-12)).mean((2, 3))


def test_what_guards_a_division_by_zero_does_not_become_zero() -> None:
    images = torch.rand(2, 3, 8, 8)
    half = to_half(export_model(Guarded().eval(), (3, 8, 8), 1).SerializeToString(), "fp16")
    np.testing.assert_allclose(run(half, images.numpy()), images.mean((2, 3)).numpy(), atol=2e-3)
