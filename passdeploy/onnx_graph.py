"""Small rewrites of ONNX graphs: zeros folded away, dead nodes removed."""

from __future__ import annotations

import ast
from collections.abc import Collection, Mapping
from typing import Any

_KEEPS_ZERO = {
    "Relu", "LeakyRelu", "Elu", "HardSwish", "Gelu", "Mish", "Tanh", "Identity", "Dropout", "Reshape", "Transpose",
    "Flatten", "Squeeze", "Unsqueeze", "AveragePool", "GlobalAveragePool", "MaxPool", "ReduceMean", "Expand", "Cast",
    "Neg", "Slice", "Swish",
}  # fmt: skip
_KEEPS_SIGN = {
    "MaxPool", "AveragePool", "GlobalAveragePool", "ReduceMean", "Identity", "Dropout", "Reshape", "Flatten",
    "Transpose", "Slice", "Squeeze", "Unsqueeze",
}  # fmt: skip


def consumers_of(proto: Any) -> dict[str, list[Any]]:
    """The nodes that read each value."""
    readers: dict[str, list[Any]] = {}
    for node in proto.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    return readers


def fold_zeros(proto: Any, zeros: Collection[str] = ()) -> bool:
    """Removes additions of zero, in place: ``x + 0`` becomes ``x``, ``x * 0`` becomes 0.

    A sum that is larger than `x` stays; where shapes are not known they are taken to agree, as they do at the end of a
    residual branch.

    Args:
        proto: An `onnx.ModelProto`.
        zeros: Values taken as zero, besides the constants that stand for removed branches.

    Returns:
        Whether anything changed.
    """
    graph = proto.graph
    zero = set(zeros) | {i.name for i in graph.initializer if _is_zero(i)}
    if not zero:
        return False
    outputs = {output.name for output in graph.output}
    shapes = {v.name: _dimensions(v) for v in (*graph.value_info, *graph.input)}
    alias: dict[str, str] = {}
    kept = []
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name in alias:
                node.input[i] = alias[name]
        hits = [name in zero for name in node.input]
        folded = False
        if any(hits):
            if node.op_type in ("Add", "Sum") and len(hits) == 2 and not all(hits) and node.output[0] not in outputs:
                rest = node.input[hits.index(False)]
                if shapes.get(rest) == shapes.get(node.output[0]):
                    alias[node.output[0]] = rest
                    folded = True
            elif (
                (node.op_type in _KEEPS_ZERO and hits[0])
                or node.op_type == "Mul"
                or (node.op_type in ("Add", "Concat") and all(hits))
            ):
                zero.add(node.output[0])
        if not folded:
            kept.append(node)
    if not alias:
        return False
    del graph.node[:]
    graph.node.extend(kept)
    return True


def fold_rectifiers(proto: Any) -> bool:
    """Removes Relu nodes whose input can't be negative, in place: removed blocks leave ``relu(relu(x))``."""
    graph = proto.graph
    outputs = {output.name for output in graph.output}
    positive: set[str] = set()
    alias: dict[str, str] = {}
    kept = []
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name in alias:
                node.input[i] = alias[name]
        known = bool(node.input) and node.input[0] in positive
        if node.op_type == "Relu" and known and node.output[0] not in outputs:
            alias[node.output[0]] = node.input[0]
            continue
        if (
            node.op_type in ("Relu", "Sigmoid", "HardSigmoid")
            or (node.op_type in _KEEPS_SIGN and known)
            or (node.op_type in ("Add", "Mul", "Concat", "Max") and all(name in positive for name in node.input))
        ):
            positive.add(node.output[0])
        kept.append(node)
    if not alias:
        return False
    del graph.node[:]
    graph.node.extend(kept)
    return True


def fold_expands(proto: Any) -> None:
    """Bypasses expansions that the operator behind them does by itself, in place (``x * gate.expand_as(x)``)."""
    graph = proto.graph
    shapes = {v.name: _dimensions(v) for v in (*graph.value_info, *graph.input)}
    readers = consumers_of(proto)
    outputs = {output.name for output in graph.output}
    for node in graph.node:
        if node.op_type != "Expand" or node.output[0] in outputs or node.output[0] not in shapes:
            continue
        name, shape = node.output[0], shapes[node.output[0]]
        behind = readers.get(name, [])
        if all(
            reader.op_type in ("Add", "Mul", "Sub", "Div")
            and any(shapes.get(other) == shape for other in reader.input if other != name)
            for reader in behind
        ):
            for reader in behind:
                for i, other in enumerate(reader.input):
                    if other == name:
                        reader.input[i] = node.input[0]


def fold_constants(proto: Any) -> None:
    """Computes additions and products of two initialisers, in place (a prompt in its frame, plus the normalisation)."""
    import numpy as np
    from onnx import numpy_helper

    graph = proto.graph
    known = {i.name: i for i in graph.initializer}
    functions = {"Add": np.add, "Mul": np.multiply}
    kept = []
    for node in graph.node:
        if node.op_type in functions and all(name in known for name in node.input):
            value = functions[node.op_type](*(numpy_helper.to_array(known[name]) for name in node.input))
            graph.initializer.append(numpy_helper.from_array(value, node.output[0]))
            known[node.output[0]] = graph.initializer[-1]
        else:
            kept.append(node)
    del graph.node[:]
    graph.node.extend(kept)


def _dimensions(value: Any) -> tuple[int, ...]:
    return tuple(d.dim_value for d in value.type.tensor_type.shape.dim)


def _is_zero(initializer: Any) -> bool:
    """Whether a computed constant is zero; parameters never count, whatever their values.

    Theirs are names such as ``layer1.0.conv1.bias``; what was computed is named after a node, with a slash.
    """
    from onnx import numpy_helper

    if "." in initializer.name and "/" not in initializer.name:
        return False
    array = numpy_helper.to_array(initializer)
    return array.dtype.kind == "f" and array.size > 0 and not array.any()


def remove_unused(proto: Any) -> set[str]:
    """Removes nodes that no output depends on, and their initialisers, in place; returns the names still read."""
    graph = proto.graph
    needed = {output.name for output in graph.output}
    kept = []
    for node in reversed(graph.node):
        if any(name in needed for name in node.output):
            kept.append(node)
            needed.update(node.input)
            for attribute in node.attribute:
                for inner in attribute.g.node:  # a subgraph reads values of the outer graph
                    needed.update(inner.input)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    initializers = [i for i in graph.initializer if i.name in needed]
    del graph.initializer[:]
    graph.initializer.extend(initializers)
    return needed


def name_after_modules(proto: Any) -> None:
    """Names nodes and what they compute after the modules they come from, in place: ``layer1.0.conv1/Conv``.

    That is what viewers show, what profilers report and what compilers name their fused layers after. The modules are
    in the exporter's notes; a layer that was fused with its norm is named after the layer.
    """
    graph = proto.graph
    fixed = {value.name for value in (*graph.input, *graph.output, *graph.initializer)}
    fixed |= {name for node in graph.node for attribute in node.attribute for inner in attribute.g.node
              for name in inner.input}  # fmt: skip
    parameters = {i.name: i.name.rpartition(".")[0] for i in graph.initializer if i.name.endswith(".weight")}
    used: dict[str, int] = {}
    renamed: dict[str, str] = {}
    for node in graph.node:
        module = next((parameters[name] for name in node.input if name in parameters), None) or _scope(node)
        name = f"{module}/{node.op_type}" if module else node.op_type
        count = used[name] = used.get(name, -1) + 1
        node.name = f"{name}_{count}" if count else name
        for i, output in enumerate(node.output):
            if output and output not in fixed:
                renamed[output] = f"{node.name}:{i}" if i else node.name
    for node in graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                names[i] = renamed.get(name, name)
    for value in graph.value_info:
        value.name = renamed.get(value.name, value.name)


def rename_parameters(proto: Any, names: Mapping[str, str], prefix: str = "") -> Any:
    """Names parameters after their modules' first names, in place; returns the graph.

    The exporter calls a module that is registered twice by the name that it runs under.

    Args:
        proto: An `onnx.ModelProto`.
        names: The first name of a module, by all that it has.
        prefix: Of the initialisers that these modules have; the others stay.
    """
    graph = proto.graph
    taken = {i.name for i in graph.initializer}
    renamed: dict[str, str] = {}
    for initializer in graph.initializer:
        module, _, kind = initializer.name.removeprefix(prefix).rpartition(".")
        first = names.get(module, module)
        name = f"{prefix}{first}.{kind}"
        if initializer.name.startswith(prefix) and first != module and name not in taken:
            renamed[initializer.name] = name
            initializer.name = name
    for node in graph.node:
        for reader in (node, *(inner for attribute in node.attribute for inner in attribute.g.node)):
            for i, name in enumerate(reader.input):
                reader.input[i] = renamed.get(name, name)
    return proto


def _scope(node: Any) -> str:
    """Path of the module whose forward the node was traced in; empty: the network itself, or not known."""
    notes = {note.key: note.value for note in node.metadata_props}
    scopes = ast.literal_eval(notes.get("pkg.torch.onnx.name_scopes", "[]"))
    return str(scopes[-2]) if len(scopes) > 1 else ""


def tidy(proto: Any) -> Any:
    """A freshly exported graph without the traces of removed branches, its nodes named after their modules."""
    name_after_modules(proto)
    fold_zeros(proto)
    fold_rectifiers(proto)
    fold_expands(proto)
    fold_constants(proto)
    needed = remove_unused(proto)
    graph = proto.graph
    for node in graph.node:
        del node.metadata_props[:]
        node.ClearField("doc_string")
    del graph.metadata_props[:]
    del proto.metadata_props[:]
    live = needed | {name for node in graph.node for name in node.output}
    values = [value for value in graph.value_info if value.name in live]
    del graph.value_info[:]
    graph.value_info.extend(values)
    for value in (*graph.value_info, *graph.input, *graph.output, *graph.initializer):
        del value.metadata_props[:]
        value.ClearField("doc_string")
    return proto
