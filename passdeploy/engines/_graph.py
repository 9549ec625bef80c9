"""Small facts about ONNX graphs that precision changes need."""

from __future__ import annotations

from typing import Any

_MATRIX = {"Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum"}
"""Where a network's own arithmetic begins."""


def input_stage(graph: Any) -> set[str]:
    """Names of the nodes between the images and the first convolution or matrix product: normalisation and prompt.

    They see pixels in [0, 1] at the resolution of the eye and of the training; rounding them costs accuracy and, being
    a handful of element-wise operations on three channels, saves nothing.

    Args:
        graph: An `onnx.GraphProto`; every node must have a name.
    """
    reached = {value.name for value in graph.input} - {tensor.name for tensor in graph.initializer}
    stage = set()
    for node in graph.node:
        if node.op_type not in _MATRIX and any(name in reached for name in node.input):
            stage.add(node.name)
            reached.update(node.output)
    consumed_late = {name for node in graph.node if node.name not in stage for name in node.input}
    produced = {name for node in graph.node if node.name in stage for name in node.output}
    if not consumed_late & produced or {value.name for value in graph.output} & produced:
        return set()  # no matrix product at all: nothing to tell the stage from
    return stage


def name_nodes(graph: Any) -> None:
    """Gives every nameless node a name, in place."""
    taken = {node.name for node in graph.node}
    for index, node in enumerate(graph.node):
        if not node.name:
            name = f"{node.op_type}_{index}"
            while name in taken:
                name += "_"
            node.name = name
            taken.add(name)


def drop_unused(graph: Any) -> None:
    """Removes constants that nothing reads any more, in place (subgraphs count as readers)."""
    used = {value.name for value in graph.output} | _read(graph)
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _read(graph: Any) -> set[str]:
    names = {name for node in graph.node for name in node.input}
    for node in graph.node:
        for attribute in node.attribute:
            for inner in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
                names |= _read(inner)
    return names
