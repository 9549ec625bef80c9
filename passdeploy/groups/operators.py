"""The convolutions and linear layers a network executes, and what they cost as functions of the kept units."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from passdeploy.groups.attention import Attention, attentions, first_tensor
from passdeploy.groups.channels import PRODUCERS, channel_counts
from passdeploy.groups.types import ChannelGroup, Groups
from passdeploy.weights import unwrap

Share = tuple[int, int]
"""(index of a group, channels per unit)."""


@dataclass(frozen=True)
class Operator:
    """One executed convolution or linear layer.

    With kept units w[g], its input channels are ``cin - sum((units[g] - w[g]) * per_unit)`` over `in_units`, which is
    ``in_free + sum(w[g] * per_unit)``; its output channels likewise.

    Attributes:
        name: Qualified module name; a module that runs twice gives two operators.
        kind: A grouped convolution that is not depthwise is a ``conv`` with `groups` > 1.
        kernel: Height and width.
        stride: Height and width.
        groups: Of the convolution.
        in_hw: Input height and width (tokens, 1 for a linear layer over a sequence).
        out_hw: Output height and width.
        cin: Dense input channels.
        cout: Dense output channels.
        in_units: Groups that own input channels.
        out_units: Groups that own output channels.
        gates: Depth groups whose removal removes the operator.
        in_free: Input channels that belong to no group.
        out_free: Output channels that belong to no group.
        bias: Whether it has one.
        transposed: Whether it is a transposed convolution.
    """

    name: str
    kind: Literal["conv", "depthwise", "linear"]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    groups: int
    in_hw: tuple[int, int]
    out_hw: tuple[int, int]
    cin: int
    cout: int
    in_units: tuple[Share, ...]
    out_units: tuple[Share, ...]
    gates: tuple[int, ...]
    in_free: int
    out_free: int
    bias: bool = False
    transposed: bool = False


def _pair(values: Sequence[int]) -> tuple[int, int]:
    values = tuple(values)
    return (1, values[0]) if len(values) == 1 else (int(np.prod(values[:-1])), values[-1])


def _plane(tensor: Tensor, module: nn.Module) -> tuple[int, int]:
    """Height and width, or tokens and 1; what a network folded into the batch (windows) counts as height."""
    if isinstance(module, nn.Linear):
        return int(np.prod(tensor.shape[:-1])), 1
    height, width = _pair(tensor.shape[2:])
    return int(tensor.shape[0]) * height, width


def _shares(name: str, module: nn.Module, groups: Sequence[ChannelGroup]) -> tuple[list[Share], list[Share]]:
    inside: list[Share] = []
    outside: list[Share] = []
    for index, group in enumerate(groups):
        for member in group.members:
            if member.module != name:
                continue
            (inside if member.side == "in" else outside).append((index, member.per_unit))
            if member.side == "out" and isinstance(module, nn.modules.conv._ConvNd) and module.groups > 1:
                # only whole conv groups go, and their inputs with them
                inside.append((index, member.per_unit * module.in_channels // module.out_channels))
    return inside, outside


_Depth = list[tuple[int, set[str]]]


def _operator(
    name: str,
    module: nn.Module,
    planes: tuple[tuple[int, int], tuple[int, int]],
    shares: tuple[list[Share], list[Share]],
    groups: Sequence[ChannelGroup],
    depth: _Depth,
) -> Operator:
    inside, outside = shares
    cin, cout = channel_counts(module)
    conv = module if isinstance(module, nn.modules.conv._ConvNd) else None
    kind: Literal["conv", "depthwise", "linear"] = "linear"
    if conv is not None:
        kind = "depthwise" if conv.groups == cin and conv.groups > 1 else "conv"
    return Operator(
        name=name,
        kind=kind,
        kernel=_pair(conv.kernel_size) if conv else (1, 1),
        stride=_pair(conv.stride) if conv else (1, 1),
        groups=conv.groups if conv else 1,
        in_hw=planes[0],
        out_hw=planes[1],
        cin=cin,
        cout=cout,
        in_units=tuple(inside),
        out_units=tuple(outside),
        gates=tuple(i for i, branch in depth if name in branch),
        in_free=cin - sum(groups[g].units * each for g, each in inside),
        out_free=cout - sum(groups[g].units * each for g, each in outside),
        bias=isinstance(module.bias, Tensor),
        transposed=conv is not None and conv.transposed,
    )


def _packed(
    name: str, module: nn.Module, spec: Attention, plane: tuple[int, int], groups: Sequence[ChannelGroup], depth: _Depth
) -> Operator:
    """The layer inside `nn.MultiheadAttention` that makes queries, keys and values: parameters without a module."""
    features = 3 * spec.heads * spec.head_dim
    layer = nn.Linear(int(module.embed_dim), features, module.in_proj_bias is not None, device="meta")  # type: ignore[arg-type]
    outside = [(g, 3 * spec.head_dim * each) for g, each in _shares(name, module, groups)[1]]
    packed = _operator(f"{name}.in_proj", layer, (plane, plane), ([], outside), groups, depth)
    return dataclasses.replace(packed, gates=tuple(i for i, branch in depth if name in branch))


def operators(model: nn.Module, example: Tensor, groups: Groups) -> tuple[Operator, ...]:
    """Lists the convolutions and linear layers in the order in which they run on `example`.

    Args:
        model: The network; it is copied, not changed.
        example: An input (batch size 1).
        groups: Of the network.
    """
    clone = copy.deepcopy(unwrap(model)).cpu().float().eval()
    names = {module: name for name, module in clone.named_modules()}
    depth = [(i, set(group.branch)) for i, group in enumerate(groups.groups) if group.kind == "depth"]
    found: list[Operator] = []
    begun: dict[str, int] = {}  # how many operators there were when an attention was called

    def add(name: str, module: nn.Module, planes: tuple[tuple[int, int], tuple[int, int]]) -> None:
        inside, outside = _shares(name, module, groups.groups)
        found.append(_operator(name, module, planes, (inside, outside), groups.groups, depth))

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        add(names[module], module, (_plane(first_tensor(args, kwargs), module), _plane(output, module)))

    def record_attention(name: str, module: nn.Module, spec: Attention) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], __: Any) -> None:
            layers = [part for part in (*spec.qkv, spec.proj) if part]
            if any(op.name == f"{name}.{layers[-1]}" for op in found[begun.pop(name) :]):
                return  # it calls its layers
            plane = int(np.prod(first_tensor(args, kwargs).shape[:-1])), 1
            if not spec.qkv:
                found.append(_packed(name, module, spec, plane, groups.groups, depth))
            for part in layers:
                add(f"{name}.{part}", module.get_submodule(part), (plane, plane))

        return hook

    def starting(name: str) -> Any:
        def hook(*_: Any) -> None:
            begun[name] = len(found)

        return hook

    hooks = [m.register_forward_hook(record, with_kwargs=True) for m in clone.modules() if isinstance(m, PRODUCERS)]
    hooks += [m.register_forward_pre_hook(starting(name)) for name, m, _ in attentions(clone)]
    hooks += [
        m.register_forward_hook(record_attention(name, m, spec), with_kwargs=True)
        for name, m, spec in attentions(clone)
    ]
    with torch.no_grad():
        clone(example.detach().cpu().float())
    for hook in hooks:
        hook.remove()
    return tuple(found)


def channels(operator: Operator, w: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Input channels, output channels and presence (0 or 1) of an operator, each (...), for kept units `w` (..., G)."""
    cin = operator.in_free + sum((w[..., g] * each for g, each in operator.in_units), np.zeros(w.shape[:-1]))
    cout = operator.out_free + sum((w[..., g] * each for g, each in operator.out_units), np.zeros(w.shape[:-1]))
    present = np.ones(w.shape[:-1])
    for gate in operator.gates:
        present = present * w[..., gate]
    return cin, cout, present


def units_of(groups: Groups) -> np.ndarray:
    """Units per group (G,): the widths vector of the dense network."""
    return np.array([group.units for group in groups.groups], dtype=float)


def macs(ops: Sequence[Operator], w: Any | None = None) -> Any:
    """Multiply-accumulates of one image in the convolutions and linear layers.

    Args:
        ops: From `operators`.
        w: Kept units (G,) or (n, G); None: the dense network.

    Returns:
        A number, or (n,).
    """
    return _cost(ops, w, per_pixel=True)


def params(ops: Sequence[Operator], w: Any | None = None) -> Any:
    """Weights and biases of the convolutions and linear layers (no norms); arguments as for `macs`."""
    return _cost(ops, w, per_pixel=False)


def _cost(ops: Sequence[Operator], w: Any | None, per_pixel: bool) -> Any:
    total: Any = 0.0
    counted: set[str] = set()
    for op in ops:
        cin, cout, present = (op.cin, op.cout, 1) if w is None else channels(op, np.asarray(w, dtype=float))
        each = op.cin / op.groups if op.groups > 1 else cin  # whole conv groups go: the inputs of each stay as they are
        weights = each * cout * op.kernel[0] * op.kernel[1]
        if per_pixel:
            height, width = op.in_hw if op.transposed else op.out_hw
            total = total + present * weights * height * width
        elif op.name not in counted:
            counted.add(op.name)
            total = total + present * (weights + (cout if op.bias else 0))
    return float(total) if np.ndim(total) == 0 else total
