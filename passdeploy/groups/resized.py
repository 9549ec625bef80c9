"""Operations without weights that give out another number of channels than they take: gates and pixel shuffles.

To DepGraph they are element-wise. A gated linear unit multiplies the first half of its channels by the sigmoid of the
second; a pixel shuffle by r makes one channel out of a block of r * r, and its inverse the other way round.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

_Infer = Callable[[Any, Any, list[int]], int | None]


def _grad(node: Any, kind: str) -> Any:
    """A node's gradient function, if the node is an operation that has this one; None otherwise."""
    grad = node.grad_fn if type(node.module).__name__ == "_ElementWiseOp" else None
    return grad if grad is not None and hasattr(grad, "name") and grad.name() == kind else None


def halves(node: Any) -> tuple[int, int] | None:
    """(channels that come out, that go in) of a gated linear unit over channels; None for anything else."""
    grad = _grad(node, "GluBackward0")
    if grad is None:
        return None
    shape = grad._saved_self.shape
    axis = grad._saved_dim if grad._saved_dim < len(shape) else grad._saved_dim - 2**64 + len(shape)  # it is unsigned
    return (shape[axis] // 2, shape[axis]) if axis in (1, len(shape) - 1) else None


def _ratio(node: Any) -> tuple[int, int]:
    """Channels that come out for how many that go in, in lowest terms."""
    if halves(node) is not None:
        return 1, 2
    shuffle, unshuffle = _grad(node, "PixelShuffleBackward0"), _grad(node, "PixelUnshuffleBackward0")
    if shuffle is not None:
        return 1, int(shuffle._saved_upscale_factor) ** 2
    return (1, 1) if unshuffle is None else (int(unshuffle._saved_downscale_factor) ** 2, 1)


@contextlib.contextmanager
def counted() -> Iterator[None]:
    """DepGraph's inference of channel counts, which goes through such operations, knows what they do to the count."""
    from torch_pruning.dependency import shape_infer

    def scaled(infer: _Infer, forwards: bool) -> _Infer:
        def counts(graph: Any, node: Any, recursive_depth: list[int]) -> int | None:
            found = infer(graph, node, recursive_depth)
            out, into = _ratio(node)
            return found if found is None else found * out // into if forwards else found * into // out

        return counts

    outs, ins = shape_infer.infer_out_channels_recursively, shape_infer.infer_in_channels_recursively
    with (
        mock.patch.object(shape_infer, "infer_out_channels_recursively", scaled(outs, True)),
        mock.patch.object(shape_infer, "infer_in_channels_recursively", scaled(ins, False)),
    ):
        yield


def map_resized(node: Any) -> None:
    """Sets the index maps between such an operation, which stands for what goes in, and what reads it.

    They come before the maps of a concatenation behind it, and after those on the way back.
    """
    from torch_pruning.dependency.index_mapping import _FlattenIndexMapping, _SplitIndexMapping

    (out, into), half = _ratio(node), halves(node)
    if out == into:
        return
    if half is not None:
        ahead, back = (_SplitIndexMapping(offset=[0, half[0]], reverse=way) for way in (False, True))
    else:
        ahead, back = (_FlattenIndexMapping(stride=out * into, reverse=way) for way in (into > 1, out > 1))
    for edge in node.dependencies:
        if any(edge.target is output for output in node.outputs):
            edge.index_mapping.insert(0, ahead)
    for output in node.outputs:
        for edge in output.dependencies:
            if edge.target is node:
                edge.index_mapping.append(back)
