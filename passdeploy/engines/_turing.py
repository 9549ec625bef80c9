"""TensorRT-RTX has no float32 matrix product for Turing (compute capability 7.5), but float32 convolutions.

A product with constant weights is a 1x1 convolution, so classifiers can be built all the same. Products of two
activations (attention) stay as they are: in float32, such a network can't be compiled for Turing.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def products_to_convolutions(data: bytes) -> bytes:
    """Replaces every Gemm and MatMul with constant weights in a serialised ONNX model by a 1x1 convolution."""
    import onnx
    from onnx import shape_inference

    model = shape_inference.infer_shapes(onnx.load_model_from_string(data))
    graph = model.graph
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    values = [*graph.input, *graph.value_info, *graph.output]
    shapes = {
        v.name: [d.dim_value if d.HasField("dim_value") else -1 for d in v.type.tensor_type.shape.dim] for v in values
    }
    nodes: list[Any] = []
    for node in graph.node:
        found = _product(node, constants)
        if found is None or shapes.get(node.input[0], [-1, -1]).count(-1) > 1 or node.output[0] not in shapes:
            nodes.append(node)
            continue
        nodes += _convolution(node, *found, shapes[node.output[0]], graph)
    del graph.node[:]
    graph.node.extend(nodes)
    result: bytes = model.SerializeToString()
    return result


def _product(node: Any, constants: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray | None] | None:
    """Weights (K, N) and bias (N,) of a product with constants; None when it is something else."""
    from onnx import helper

    if node.op_type not in ("Gemm", "MatMul") or node.input[1] not in constants:
        return None
    weight, bias = constants[node.input[1]], None
    if weight.ndim != 2:
        return None
    if node.op_type == "Gemm":
        given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if given.get("transA"):
            return None
        weight = (weight.T if given.get("transB") else weight) * np.float32(given.get("alpha", 1.0))
        if len(node.input) == 3:
            if node.input[2] not in constants or constants[node.input[2]].ndim > 1:
                return None
            scale = np.float32(given.get("beta", 1.0))
            bias = np.broadcast_to(constants[node.input[2]] * scale, weight.shape[1:]).copy()
    return weight, bias


def _convolution(node: Any, weight: np.ndarray, bias: np.ndarray | None, shape: list[int], graph: Any) -> list[Any]:
    from onnx import helper, numpy_helper

    inner, outer = weight.shape
    made = {
        "flat": np.array([-1, inner, 1, 1], np.int64),
        "kernel": np.ascontiguousarray(weight.T.reshape(outer, inner, 1, 1)),
        "shape": np.array(shape, np.int64),
    }
    if bias is not None:
        made["bias"] = bias
    name = {key: f"{node.output[0]}__{key}" for key in (*made, "in", "out")}
    graph.initializer.extend(numpy_helper.from_array(array, name[key]) for key, array in made.items())
    parameters = [name["kernel"], *([name["bias"]] if bias is not None else [])]
    return [
        helper.make_node("Reshape", [node.input[0], name["flat"]], [name["in"]], name=name["in"]),
        helper.make_node("Conv", [name["in"], *parameters], [name["out"]], name=node.name or name["out"]),
        helper.make_node("Reshape", [name["out"], name["shape"]], [node.output[0]], name=name["shape"]),
    ]
