"""Half-precision graphs without half-precision hardware: ONNX Runtime and onnx's reference run them on the CPU."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from passdeploy.engines._convert import to_half
from passdeploy.engines._graph import input_stage
from passdeploy.errors import BadInput
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


def test_squares_that_overflow_fp16_are_computed_in_fp32() -> None:
    data = tiny(
        200.0,
        [
            ("Conv", ["images", "w"], "a"),
            ("ReduceL2", ["a"], "norm"),
            ("Div", ["a", "norm"], "logits"),
        ],
    )
    images = np.ones((1, 3, 4, 4), np.float32)
    assert np.isfinite(run(to_half(data, "fp16"), images)).all()
    np.testing.assert_allclose(run(to_half(data, "fp16"), images), run(data, images), rtol=2e-3)


def test_a_graph_without_matrix_products_has_no_input_stage() -> None:
    model = onnx.load_model_from_string(tiny(1.0, [("Relu", ["images"], "a"), ("Neg", ["a"], "logits")]))
    assert input_stage(model.graph) == set()
