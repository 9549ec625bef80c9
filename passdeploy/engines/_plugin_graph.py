"""Puts the mask kernel's plugin where a masked ONNX graph multiplies by masks.

Pure graph surgery, so that it is tested without TensorRT. The plugin itself: `passdeploy.engines._trt_plugin`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

NAMESPACE, NAME = "passdeploy", "masked_affine_act"
_ACTIVATIONS = {"Relu": "relu", "HardSwish": "hardswish"}


def plugin_name(activation: str) -> str:
    """Of the plugin with one of `geometry.ACTIVATIONS`: each has its own, so that none has an attribute.

    TensorRT 11 hands attributes over as arrays, and reads their annotations in a way that Python 3.13 refuses.
    """
    return f"{NAME}_{activation}"


def with_plugin(data: bytes) -> bytes:
    """Replaces products with masks, and the activation right before them, by the plugin's node.

    Args:
        data: Of `passdeploy.kernels.masked_forward.masked_network` with ``plain=True``, in any float precision.

    Returns:
        The graph; TensorRT's parser finds the plugin by the node's type (`plugin_name`) and its ``plugin_namespace``.
        Inputs: x, then mask, scale and shift, float32 (C,).
    """
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load_model_from_string(data)
    graph = model.graph
    held = {tensor.name: tensor for tensor in graph.initializer}
    readers: dict[str, int] = {value.name: 1 for value in graph.output}
    for node in graph.node:
        for name in node.input:
            readers[name] = readers.get(name, 0) + 1
    producers = {name: node for node in graph.node for name in node.output}
    nodes: list[Any] = []
    gone: set[str] = set()
    for node in graph.node:
        mask = _mask(node, held)
        if mask is None:
            nodes.append(node)
            continue
        name, values = mask
        source = next(given for given in node.input if given != name)
        before = producers.get(source)
        activation = "none"
        if before is not None and before.op_type in _ACTIVATIONS and readers[source] == 1:
            activation, source = _ACTIVATIONS[before.op_type], before.input[0]
            gone.add(before.output[0])
        parts = {"mask": values, "scale": np.ones_like(values), "shift": np.zeros_like(values)}
        for part, array in parts.items():
            graph.initializer.append(numpy_helper.from_array(array, f"{node.output[0]}_{part}"))
        nodes.append(
            helper.make_node(
                plugin_name(activation),
                [source, *(f"{node.output[0]}_{part}" for part in parts)],
                list(node.output),
                name=f"masked_{node.output[0]}",
                domain=NAMESPACE,
                plugin_namespace=NAMESPACE,
                plugin_version="1",
            )
        )
    del graph.node[:]
    graph.node.extend(node for node in nodes if not set(node.output) & gone)
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    if all(entry.domain != NAMESPACE for entry in model.opset_import):
        model.opset_import.append(helper.make_opsetid(NAMESPACE, 1))
    result: bytes = model.SerializeToString()
    return result


def _mask(node: Any, held: dict[str, Any]) -> tuple[str, np.ndarray] | None:
    """The mask that a product multiplies by, (C,) float32: a constant (C, 1, 1) of zeros and ones."""
    from onnx import numpy_helper

    if node.op_type != "Mul":
        return None
    for name in node.input:
        if name in held:
            values = numpy_helper.to_array(held[name]).astype(np.float32)
            if values.ndim >= 3 and values.size == values.shape[-3] > 1 and np.isin(values, (0.0, 1.0)).all():
                return name, np.ascontiguousarray(values.reshape(-1))
    return None
