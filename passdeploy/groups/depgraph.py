"""Torch-Pruning's dependency graph (DepGraph, arXiv 2301.12900) of a network, and where it needs a hand.

DepGraph follows the gradient functions of one forward pass. What it can't map does not end the whole graph here, and
splits into equal parts are mapped by what the gradient function says.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from passdeploy.groups.resized import counted, map_resized


def tensors(outputs: Any) -> list[Tensor]:
    """All floating-point tensors in a network's outputs (a tensor, or nested tuples, lists and dictionaries)."""
    if isinstance(outputs, Tensor):
        return [outputs] if outputs.is_floating_point() else []
    if isinstance(outputs, Mapping):
        outputs = outputs.values()
    return [tensor for output in outputs for tensor in tensors(output)] if isinstance(outputs, Iterable) else []


class WithInput(nn.Module):
    """The network behind an identity layer that stands for its input, so that the graph sees what the input feeds."""

    def __init__(self, network: nn.Module, example: Tensor) -> None:
        super().__init__()
        channels = example.shape[1] if example.ndim > 2 else example.shape[-1]
        self.input: nn.Module
        if example.ndim == 4:
            self.input = nn.Conv2d(channels, channels, 1, bias=False)
            nn.init.dirac_(self.input.weight)
        else:
            channels = example.shape[-1]
            self.input = nn.Linear(channels, channels, bias=False)
            nn.init.eye_(self.input.weight)
        self.input.to(example.dtype)
        self.network = network

    def forward(self, x: Tensor) -> Any:
        # times 1: an output that comes straight out of a layer gets a node of its own
        return [output * 1 for output in tensors(self.network(self.input(x)))]


def chunks(node: Any) -> tuple[int, int] | None:
    """(channels of each part, of all) when a node splits the channels, or takes one part of them; None otherwise."""
    kind, grad = type(node.module).__name__, node.grad_fn
    shape: Sequence[int] = getattr(grad, "_saved_self_sym_sizes", ())
    if kind not in ("_SplitOp", "_SliceOp") or len(shape) < 2 or not node.inputs:
        return None
    whole = int(shape[1])
    if grad._saved_dim not in (1, 1 - len(shape), (1 - len(shape)) % 2**64):  # unsigned in some versions
        return None
    if hasattr(grad, "_saved_split_sizes"):
        sizes = {int(size) for size in grad._saved_split_sizes}
        return (sizes.pop(), whole) if len(sizes) == 1 else None
    if hasattr(grad, "_saved_split_size"):
        each, start = int(grad._saved_split_size), 0
    elif getattr(grad, "_saved_step", 0) == 1:
        start = int(grad._saved_start)
        each = min(int(grad._saved_end), whole) - start
    else:
        return None
    return (each, whole) if 0 < each < whole and whole % each == 0 and start % each == 0 else None


def _map_parts(node: Any) -> bool:
    """Sets the index maps of a split by which part each consumer reads; False when that can't be told.

    DepGraph takes its first consumer for the reader of the first part, which need not be so.
    """
    from torch_pruning.dependency.index_mapping import _SplitIndexMapping

    sizes = getattr(node.grad_fn, "_saved_split_sizes", None)
    if type(node.module).__name__ != "_SplitOp" or sizes is None or chunks(node) is not None:
        return False
    offsets = [0]
    for size in sizes:
        offsets.append(offsets[-1] + int(size))
    parts = {}
    for output in node.outputs:
        read = [number for source, number in output.grad_fn.next_functions if source is node.grad_fn]
        if len(read) != 1:
            return False
        parts[id(output)] = offsets[read[0] : read[0] + 2]
    node.module.split_sizes, node.module.offsets = [int(size) for size in sizes], offsets
    for edge in node.dependencies:
        if id(edge.target) in parts:
            edge.index_mapping[0] = _SplitIndexMapping(offset=parts[id(edge.target)], reverse=False)
    for output in node.outputs:
        for edge in output.dependencies:
            if edge.target is node:
                edge.index_mapping[0] = _SplitIndexMapping(offset=parts[id(output)], reverse=True)
    return True


def _map_equal_parts(node: Any) -> bool:
    """Sets the index maps of a split into equal parts; False when the node is something else.

    `_Walk` unites channels at the same place of all parts, so that any part may stand for the one that is read.
    """
    from torch_pruning.dependency.index_mapping import _SplitIndexMapping

    found = chunks(node) if type(node.module).__name__ == "_SplitOp" else None
    if found is None:
        return False
    each = found[0]
    node.module.split_sizes = [each] * len(node.outputs)
    node.module.offsets = [each * i for i in range(len(node.outputs) + 1)]
    for edge in node.dependencies:
        if any(edge.target is output for output in node.outputs):
            edge.index_mapping[0] = _SplitIndexMapping(offset=[0, each], reverse=False)
    for output in node.outputs:
        for edge in output.dependencies:
            if edge.target is node:
                edge.index_mapping[0] = _SplitIndexMapping(offset=[0, each], reverse=True)
    return True


def dependency_graph(model: WithInput, example: Tensor) -> tuple[Any, set[int]]:
    """DepGraph's graph, and the nodes (by id) whose index maps it could not work out."""
    import torch_pruning as tp
    from torch_pruning.dependency import index_mapping

    broken: set[int] = set()
    kinds = tp.ops.OPTYPE
    maps = {
        kinds.CONCAT: index_mapping.update_concat_index_mapping,
        kinds.SPLIT: index_mapping.update_split_index_mapping,
        kinds.RESHAPE: index_mapping.update_reshape_index_mapping,
        kinds.UNBIND: index_mapping.update_unbind_index_mapping,
        kinds.EXPAND: index_mapping.update_expand_index_mapping,
        kinds.SLICE: index_mapping.update_slice_index_mapping,
    }

    def update(graph: Any) -> None:
        """As DepGraph's own, but a node that it can't handle does not end the whole graph."""
        nodes = sorted(graph.module2node.values(), key=lambda node: node.type != kinds.SPLIT)
        for node in nodes:
            if node.type in maps:
                try:
                    if not _map_equal_parts(node) and not _map_parts(node):
                        maps[node.type](graph, node)
                except Exception:
                    broken.add(id(node))
        for node in nodes:
            map_resized(node)

    with (
        counted(),
        torch.enable_grad(),
        warnings.catch_warnings(),
        mock.patch.object(index_mapping, "update_index_mapping", update),
    ):
        warnings.simplefilter("ignore")
        graph = tp.DependencyGraph().build_dependency(model, example_inputs=example, verbose=False)
    return graph, broken
