from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from passdeploy.onnx_graph import (
    fold_constants,
    fold_expands,
    fold_rectifiers,
    fold_zeros,
    remove_unused,
    rename_parameters,
)


def _model(
    nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray], known: tuple[str, ...] = ()
) -> onnx.ModelProto:
    shape = (1, 4, 2, 2)
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
        value_info=[helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in known],
    )
    return helper.make_model(graph)


def _kinds(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


ZEROS = np.zeros((1, 4, 2, 2), np.float32)


def test_a_sum_with_zero_goes() -> None:
    nodes = [
        helper.make_node("Sigmoid", ["x"], ["a"]),
        helper.make_node("Add", ["zeros_like", "a"], ["b"]),
        helper.make_node("Sigmoid", ["b"], ["y"]),
    ]
    model = _model(nodes, {"zeros_like": ZEROS}, ("a", "b"))
    assert fold_zeros(model)
    remove_unused(model)
    assert _kinds(model) == ["Sigmoid", "Sigmoid"]
    assert not model.graph.initializer


def test_a_product_with_zero_is_zero() -> None:
    nodes = [
        helper.make_node("Sigmoid", ["x"], ["a"]),
        helper.make_node("Mul", ["a", "branch"], ["b"]),
        helper.make_node("Transpose", ["b"], ["c"], perm=[0, 1, 2, 3]),
        helper.make_node("Add", ["a", "c"], ["d"]),
        helper.make_node("Sigmoid", ["d"], ["y"]),
    ]
    model = _model([helper.make_node("Exp", ["x"], ["branch"]), *nodes], {}, ("a", "d"))
    assert fold_zeros(model, {"branch"})
    remove_unused(model)
    assert _kinds(model) == ["Sigmoid", "Sigmoid"]


def test_parameters_that_are_zero_stay() -> None:
    nodes = [helper.make_node("Add", ["x", "layer.bias"], ["a"]), helper.make_node("Sigmoid", ["a"], ["y"])]
    model = _model(nodes, {"layer.bias": ZEROS}, ("a",))
    assert not fold_zeros(model)
    assert _kinds(model) == ["Add", "Sigmoid"]


def test_a_sum_that_broadcasts_stays() -> None:
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["a"], keepdims=1),
        helper.make_node("Add", ["a", "zeros"], ["b"]),
        helper.make_node("Sigmoid", ["b"], ["y"]),
    ]
    model = _model(nodes, {"zeros": ZEROS}, ("b",))
    model.graph.value_info.append(helper.make_tensor_value_info("a", TensorProto.FLOAT, (1, 1, 1, 1)))
    assert not fold_zeros(model)


def test_rectifiers_of_what_is_not_negative_go() -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("MaxPool", ["a"], ["b"], kernel_shape=[1, 1]),
        helper.make_node("Relu", ["b"], ["c"]),
        helper.make_node("Neg", ["c"], ["d"]),
        helper.make_node("Relu", ["d"], ["y"]),
    ]
    model = _model(nodes, {})
    assert fold_rectifiers(model)
    assert _kinds(model) == ["Relu", "MaxPool", "Neg", "Relu"]
    assert model.graph.node[2].input[0] == "b"


def test_an_expansion_before_a_product_goes() -> None:
    nodes = [
        helper.make_node("GlobalAveragePool", ["x"], ["a"]),
        helper.make_node("Expand", ["a", "shape"], ["b"]),
        helper.make_node("Mul", ["x", "b"], ["y"]),
    ]
    model = _model(nodes, {"shape": np.array([1, 4, 2, 2])}, ("b",))
    fold_expands(model)
    remove_unused(model)
    assert _kinds(model) == ["GlobalAveragePool", "Mul"]
    onnx.checker.check_model(model, full_check=True)


def test_an_expansion_that_is_the_shape_stays() -> None:
    nodes = [
        helper.make_node("GlobalAveragePool", ["x"], ["a"]),
        helper.make_node("Expand", ["a", "shape"], ["b"]),
        helper.make_node("Add", ["a", "b"], ["y"]),
    ]
    model = _model(nodes, {"shape": np.array([1, 4, 2, 2])}, ("b",))
    fold_expands(model)
    assert _kinds(model) == ["GlobalAveragePool", "Expand", "Add"]


def test_constants_are_computed() -> None:
    nodes = [helper.make_node("Mul", ["p", "frame"], ["q"]), helper.make_node("Add", ["x", "q"], ["y"])]
    model = _model(nodes, {"p": ZEROS + 3, "frame": ZEROS + 2})
    fold_constants(model)
    remove_unused(model)
    assert _kinds(model) == ["Add"]
    assert [i.name for i in model.graph.initializer] == ["q"]
    assert (numpy_helper.to_array(model.graph.initializer[0]) == 6).all()


def test_parameters_get_the_first_names_of_their_modules() -> None:
    nodes = [
        helper.make_node("Add", ["x", "network.stage.bias"], ["a"]),
        helper.make_node("Add", ["a", "stage.bias"], ["b"]),
        helper.make_node("Mul", ["b", "network.own.scale"], ["c"]),
        helper.make_node("Mul", ["c", "network.scale"], ["y"]),
    ]
    held = ("network.stage.bias", "stage.bias", "network.own.scale", "network.scale")
    model = _model(nodes, {name: ZEROS + i for i, name in enumerate(held)})
    rename_parameters(model, {"": "", "base.stage": "base.stage", "stage": "base.stage", "own": "own"}, "network.")
    names = ("network.base.stage.bias", *held[1:])
    assert tuple(node.input[1] for node in model.graph.node) == names == tuple(i.name for i in model.graph.initializer)
    assert [float(numpy_helper.to_array(i).flat[0]) for i in model.graph.initializer] == [0, 1, 2, 3]
    onnx.checker.check_model(model, full_check=True)
