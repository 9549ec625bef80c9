"""Self-attention whose heads are units: how to recognise it, what stands for it in the traced graph, how heads go.

A head is the rows of its query, key and value and the columns of the projection behind; heads do not see each other, so
that masking the projection's columns is the same as removing the head. The width of a head, and with it attention's
scale, stays. To the dependency graph an attention is two linear layers with as many features between them as all heads
have together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from passdeploy.groups.attention_cut import SLIM, SlimMultiheadAttention, slim_kind
from passdeploy.groups.wrapped import replace_module

VALUE = "passdeploy_value"
"""Child of a `StandIn`: the linear layer whose output features are those of all heads."""
_QKV, _PROJ, _HEADS = ("qkv", "to_qkv"), ("proj", "merge", "out_proj"), ("num_heads", "n_heads")


@dataclass(frozen=True)
class Attention:
    """A self-attention module.

    Attributes:
        heads: How many.
        head_dim: Features of one head.
        qkv: Child that makes queries, keys and values, all heads of each after another; empty for
            `nn.MultiheadAttention`, which keeps them as parameters.
        proj: Child that mixes the heads.
    """

    heads: int
    head_dim: int
    qkv: str
    proj: str

    def rows(self, head: int) -> list[int]:
        """The output features of `qkv` that belong to a head."""
        whole = self.heads * self.head_dim
        return [part * whole + head * self.head_dim + i for part in range(3) for i in range(self.head_dim)]

    def kept_rows(self, kept: Iterable[int]) -> list[int]:
        """The output features of `qkv` that are left with these heads, in their order."""
        return sorted(row for head in kept for row in self.rows(head))


def _child(module: nn.Module, names: Sequence[str]) -> str:
    return next((name for name in names if isinstance(getattr(module, name, None), nn.Linear)), "")


def head_count(module: nn.Module) -> int | None:
    """Heads of an attention module as its own attribute says; None when it is none."""
    if isinstance(module, nn.MultiheadAttention):
        return module.num_heads
    name = next((name for name in _HEADS if isinstance(getattr(module, name, None), int)), None)
    return int(getattr(module, name)) if name and _child(module, _QKV) and _child(module, _PROJ) else None


def describe(module: nn.Module) -> Attention | None:
    """What is known of a module that is a self-attention of a known layout; None when it is not."""
    heads = head_count(module)
    if not heads:
        return None
    proj = _child(module, _PROJ)
    layer = getattr(module, proj, None)
    if not isinstance(layer, nn.Linear) or layer.in_features % heads:
        return None
    if isinstance(module, nn.MultiheadAttention):
        packed = isinstance(module, SlimMultiheadAttention) or module._qkv_same_embed_dim
        plain = packed and module.bias_k is None and not module.add_zero_attn
        return Attention(heads, layer.in_features // heads, "", proj) if plain else None
    qkv = _child(module, _QKV)
    if getattr(module, qkv).out_features != 3 * layer.in_features:
        return None
    return Attention(heads, layer.in_features // heads, qkv, proj)


def attentions(model: nn.Module) -> Iterator[tuple[str, nn.Module, Attention]]:
    """All self-attentions of a network: (qualified name, module, description)."""
    for name, module in model.named_modules():
        found = describe(module) if name else None
        if found is not None:
            yield name, module, found


def first_tensor(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The first tensor that a module is called with, by position or by name (``attention(mask=None, query=x)``)."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)


class StandIn(nn.Module):
    """Takes an attention's place while the graph is traced: features pass through a linear layer and the projection."""

    def __init__(self, module: nn.Module, spec: Attention) -> None:
        super().__init__()
        layer = getattr(module, spec.qkv) if spec.qkv else None
        inputs = layer.in_features if layer is not None else int(module.embed_dim)  # type: ignore[arg-type]
        proj = getattr(module, spec.proj)
        self.pair = isinstance(module, nn.MultiheadAttention)
        setattr(self, VALUE, nn.Linear(inputs, spec.heads * spec.head_dim).to(proj.weight.dtype))
        self.proj_name = spec.proj
        setattr(self, spec.proj, proj)
        # PyTorch's encoder layers ask their attention for these; the last two keep them off their fused path, which
        # would read weights that are not here.
        self.batch_first = getattr(module, "batch_first", True)
        self._qkv_same_embed_dim, self.in_proj_bias = False, None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Maps (..., features) to the same shape."""
        y = getattr(self, self.proj_name)(getattr(self, VALUE)(first_tensor(args, kwargs)))
        return (y, None) if self.pair else y


def replaceable(model: nn.Module, example: Tensor) -> dict[str, Attention]:
    """The attentions of which all inputs are one tensor, and the output has its shape (features aside)."""
    fits: dict[str, bool] = {}
    weighted: set[str] = set()
    found = {name: (module, spec) for name, module, spec in attentions(model)}

    def recorder(name: str) -> Any:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            out = output[0] if isinstance(output, tuple) else output
            given = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
            x = given[0] if given else None
            same = x is not None and isinstance(out, Tensor) and x.ndim > 2 and x.shape[:-1] == out.shape[:-1]
            if isinstance(module, nn.MultiheadAttention):
                same = same and len(given) == 3 and all(tensor is x for tensor in given)
                if isinstance(output, tuple) and output[1] is not None:
                    weighted.add(name)
            fits[name] = fits.get(name, True) and same

        return record

    hooks = [module.register_forward_hook(recorder(name), with_kwargs=True) for name, (module, _) in found.items()]
    try:
        with torch.no_grad():
            outputs = model(example)
    finally:
        for hook in hooks:
            hook.remove()
    fitting = [name for name, fit in fits.items() if fit]
    read = _weights_read(model, example, outputs, [name for name in fitting if name in weighted])
    return {name: found[name][1] for name in fitting if name not in read}


def _weights_read(model: nn.Module, example: Tensor, expected: Any, names: Sequence[str]) -> set[str]:
    """Of attentions that return their weights, as they do unless told otherwise: those whose weights are used."""

    def drop(module: nn.Module, args: Any, output: Any) -> Any:
        return output[0], None

    def used(names: Sequence[str]) -> bool:
        hooks = [model.get_submodule(name).register_forward_hook(drop) for name in names]
        try:
            with torch.no_grad():
                outputs = model(example)
        except Exception:  # whatever code of the network's makes of a None
            return True
        finally:
            for hook in hooks:
                hook.remove()
        same = isinstance(outputs, Tensor) and isinstance(expected, Tensor) and torch.equal(outputs, expected)
        return not same

    if not names or not used(names):
        return set()
    return {name for name in names if used([name])}


def put_stand_ins(model: nn.Module, specs: dict[str, Attention]) -> None:
    """Replaces attentions by their stand-ins, in place."""
    for name, spec in specs.items():
        replace_module(model, name, StandIn(model.get_submodule(name), spec).eval())


def packed_weights(module: nn.Module, heads: Sequence[int]) -> Tensor | None:
    """(heads, values): the queries', keys' and values' weights of heads that `nn.MultiheadAttention` keeps itself."""
    spec = describe(module)
    if spec is None or spec.qkv or not isinstance(module, nn.MultiheadAttention):
        return None
    weight = module.in_proj_weight.detach()
    return torch.stack([weight[spec.rows(head)].flatten() for head in heads])


def gate_name(model: nn.Module, name: str) -> str:
    """The layer whose zero weights make a gate's output zero: an attention's projection, else the gate itself."""
    spec = describe(model.get_submodule(name))
    return f"{name}.{spec.proj}" if spec is not None else name


def cut_heads(module: nn.Module, kept: Tensor) -> None:
    """Keeps the chosen heads of an attention, in place; its `qkv` and `proj` children are cut by themselves.

    Raises:
        ValueError: It is no attention that is known.
    """
    heads = head_count(module)
    if heads is None:
        raise ValueError(f"a {type(module).__name__} has no heads that are known")
    slim = slim_kind(module)
    if slim is not None:
        SLIM[slim](module)
    if isinstance(module, nn.MultiheadAttention):
        spec = Attention(heads, module.head_dim, "", "out_proj")  # its projection may have been cut before
        rows = torch.tensor(spec.kept_rows(kept.tolist()))
        for name in ("in_proj_weight", "in_proj_bias"):
            _keep(module, name, 0, rows)
    else:
        layer = getattr(module, _child(module, _PROJ))
        for name in ("attn_dim", "attention_dim", "inner_dim", "all_head_dim"):
            value = getattr(module, name, None)
            if isinstance(value, int) and value in (layer.in_features, layer.in_features * heads // len(kept)):
                setattr(module, name, value // heads * len(kept))
        _cut_tables(module, heads, kept)
    for name in _HEADS:
        if isinstance(getattr(module, name, None), int):
            setattr(module, name, len(kept))


def _cut_tables(module: nn.Module, heads: int, kept: Tensor) -> None:
    """Biases and scales per head: parameters of the attention itself, and a small network that makes them."""
    for name, value in list(module.named_parameters(recurse=False)):
        sizes = [d for d in range(value.ndim) if value.shape[d] == heads]
        if sizes:
            _keep(module, name, sizes[-1] if value.ndim == 2 else sizes[0], kept)
    made_by = getattr(module, "cpb_mlp", None)
    last = next((m for m in reversed(list(made_by.modules())) if isinstance(m, nn.Linear)), None) if made_by else None
    if last is not None and last.out_features == heads:
        _keep(last, "weight", 0, kept)
        _keep(last, "bias", 0, kept)
        last.out_features = len(kept)


def _keep(module: nn.Module, name: str, dimension: int, kept: Tensor) -> None:
    value = getattr(module, name, None)
    if isinstance(value, nn.Parameter):
        chosen = value.detach().index_select(dimension, kept.to(value.device)).clone()
        setattr(module, name, nn.Parameter(chosen, requires_grad=value.requires_grad))
