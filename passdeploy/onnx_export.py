"""The export of a PyTorch model to an ONNX graph: quiet, with a fixed batch, tidied.

Every graph has one float32 input ``images`` (N, 3, H, W) in [0, 1], one output ``logits``, and the normalisation, the
prompt and all weights inside.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from passdeploy.engines.base import INPUT, OUTPUT
from passdeploy.errors import BadInput
from passdeploy.groups.attention import first_tensor, replaceable
from passdeploy.groups.attention_cut import SLIM, slim_kind, without_einsum
from passdeploy.groups.check import first_line
from passdeploy.groups.frozen import thaw
from passdeploy.onnx_graph import tidy


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences what the exporter prints and logs on its way."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class _Resample(nn.Module):
    """Adaptive average pooling between fixed sizes that don't divide: two small matrix products.

    The exporter writes such a pooling as a tangle of gathers whose constants contain the channel count.
    """

    rows: torch.Tensor
    columns: torch.Tensor

    def __init__(self, source: tuple[int, int], target: tuple[int, int]) -> None:
        super().__init__()
        self.register_buffer("rows", _pooling_matrix(source[0], target[0]))
        self.register_buffer("columns", _pooling_matrix(source[1], target[1]).T.contiguous())

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # called by what the pool calls it
        """Maps (N, C, *source) to (N, C, *target)."""
        return torch.matmul(torch.matmul(self.rows, input), self.columns)


def _pooling_matrix(source: int, target: int) -> torch.Tensor:
    """(target, source): row i averages the inputs floor(i * source / target) .. ceil((i + 1) * source / target) - 1."""
    matrix = torch.zeros(target, source)
    for i in range(target):
        start, end = i * source // target, -(-(i + 1) * source // target)
        matrix[i, start:end] = 1 / (end - start)
    return matrix


def _resolve_adaptive_pools(model: nn.Module, example: torch.Tensor) -> None:
    """Replaces adaptive average pools by what they are at this input size, in place."""
    sizes: dict[nn.Module, set[tuple[tuple[int, int], tuple[int, int]]]] = {}

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> None:
        source, target = first_tensor(args, kwargs).shape[-2:], output.shape[-2:]
        sizes.setdefault(module, set()).add(((source[0], source[1]), (target[0], target[1])))

    pools = [m for m in model.modules() if type(m).forward is nn.AdaptiveAvgPool2d.forward]
    hooks = [pool.register_forward_hook(record, with_kwargs=True) for pool in pools]
    model(example)
    for hook in hooks:
        hook.remove()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child not in sizes or len(sizes[child]) != 1:
                continue
            ((source, target),) = sizes[child]
            if source == target:
                setattr(parent, name, nn.Identity())
            elif source[0] % target[0] or source[1] % target[1]:
                setattr(parent, name, _Resample(source, target))


def _pin_heads(model: nn.Module, example: torch.Tensor) -> None:
    """Gives self-attentions the form that they have without some of their heads, in place.

    Dense and thin networks then export to the same operators, which is what their latencies are compared on, and what
    the slicer cuts.
    """
    without_einsum(model)
    for name in replaceable(model, example):
        module = model.get_submodule(name)
        kind = slim_kind(module)
        if kind is not None:
            SLIM[kind](module)


LARGEST = 2**31 - 2**24
"""Bytes of weights: a file of protobuf's has to be smaller than 2 GiB, graph and names included."""


def export_model(model: nn.Module, input_shape: Sequence[int], batch: int = 1) -> Any:
    """Exports a model to an `onnx.ModelProto`: constants folded, batch norms fused, removed branches gone.

    Args:
        model: Images -> logits; exported in eval mode, in float32, from a copy on the CPU.
        input_shape: (3, H, W).
        batch: Images per inference; fixed in the file.

    Raises:
        BadInput: The model can't be exported.
    """
    size = 4 * sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    if size > LARGEST:
        raise BadInput(
            f"the model can't be exported to ONNX: its weights take {size / 2**30:.1f} GiB in float32, and a file in "
            "one piece holds less than 2"
        )
    clone = copy.deepcopy(model).cpu().float().eval().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    clone.requires_grad_(False)
    example = torch.rand(batch, *input_shape, generator=torch.Generator().manual_seed(0))
    try:
        with _quiet(), torch.no_grad():
            thaw(clone)  # which become part of the convolutions in front of them
            _resolve_adaptive_pools(clone, example)
            _pin_heads(clone, example)
            program = torch.onnx.export(
                clone, (example,), dynamo=True, verbose=False, input_names=[INPUT], output_names=[OUTPUT]
            )
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise BadInput(f"the model can't be exported to ONNX: {first_line(cause)}") from error
    assert program is not None
    return tidy(program.model_proto)
