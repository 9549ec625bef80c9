"""TensorRT-RTX has no float32 matrix product for Turing (compute capability 7.5), but float32 convolutions.

A product with constant weights is a 1x1 convolution. A product of two activations (attention) is an element-wise
product and a sum, which the compiler fuses into one kernel: no tensor cores, but Turing has none for float32 anyway.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from passdeploy.engines._graph import drop_unused


def without_products(data: bytes) -> bytes:
    """Replaces the matrix products of a serialised ONNX model by what computes the same without one."""
    import onnx
    from onnx import shape_inference

    model = shape_inference.infer_shapes(onnx.load_model_from_string(data))
    graph = model.graph
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    values = [*graph.input, *graph.value_info, *graph.output]
    shapes = {
        v.name: [d.dim_value if d.HasField("dim_value") else -1 for d in v.type.tensor_type.shape.dim] for v in values
    }
    shapes |= {name: list(array.shape) for name, array in constants.items()}  # not inferred: they have theirs
    nodes: list[Any] = []
    for node in graph.node:
        found, ranks = _product(node, constants), [len(shapes.get(name, [])) for name in node.input[:2]]
        if found is not None and shapes.get(node.output[0], [-1, -1]).count(-1) <= 1:
            nodes += _convolution(node, *found, shapes[node.output[0]], graph)
        elif found is None and node.op_type == "MatMul" and min(ranks) >= 2:
            nodes += _sum_of_products(node, graph)
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    drop_unused(graph)
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


def _sum_of_products(node: Any, graph: Any) -> list[Any]:
    """(..., M, K, 1) * (..., 1, K, N), summed over K."""
    from onnx import helper, numpy_helper

    made = {"last": [-1], "third": [-3], "axis": [-2]}
    name = {key: f"{node.output[0]}__{key}" for key in (*made, "left", "right", "products")}
    graph.initializer.extend(numpy_helper.from_array(np.array(v, np.int64), name[k]) for k, v in made.items())
    return [
        helper.make_node("Unsqueeze", [node.input[0], name["last"]], [name["left"]], name=name["left"]),
        helper.make_node("Unsqueeze", [node.input[1], name["third"]], [name["right"]], name=name["right"]),
        helper.make_node("Mul", [name["left"], name["right"]], [name["products"]], name=name["products"]),
        helper.make_node(
            "ReduceSum", [name["products"], name["axis"]], [node.output[0]], name=node.name or name["axis"], keepdims=0
        ),
    ]
