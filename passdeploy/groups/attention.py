"""Self-attention whose heads are units: how to recognise it, what stands for it in the traced graph, how heads go.

A head is the rows of its query, key and value and the columns of the projection behind; heads do not see each other, so
that masking the projection's columns is the same as removing the head. The width of a head, and with it attention's
scale, stays. To the dependency graph an attention is two linear layers with as many features between them as all heads
have together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from passdeploy.groups.attention_cut import SLIM, SlimMultiheadAttention, slim_kind
from passdeploy.groups.wrapped import replace_module

VALUE = "passdeploy_value"
"""Child of a `StandIn`: the linear layer whose output features are those of all heads."""
_QKV = ("qkv", "to_qkv")
_PROJ = (
    "proj", "merge", "out_proj", "o_proj", "to_out", "wo", "w_o", "o", "out", "out_linear", "out_lin", "proj_out",
    "output", "dense", "fc_out", "fc_o", "fc",
)  # fmt: skip
_HEADS = ("num_heads", "n_heads", "num_attention_heads", "heads", "n_head", "nhead", "nheads", "h")
_WIDTHS = (
    "attn_dim", "attention_dim", "inner_dim", "all_head_dim", "all_head_size", "embed_dim", "hidden_size", "d_model",
    "dim",
)  # fmt: skip
_PLACES = ("{}", "{}_proj", "to_{}", "w{}", "w_{}", "{}_linear", "linear_{}", "{}_lin", "lin_{}", "fc_{}", "proj_{}")
_LETTERS = (("q", "k", "v"), ("query", "key", "value"), ("queries", "keys", "values"), ("Q", "K", "V"))
_SEPARATE = tuple(tuple(place.format(part) for part in parts) for place in _PLACES for parts in _LETTERS)


@dataclass(frozen=True)
class Attention:
    """A self-attention module.

    Attributes:
        heads: How many.
        head_dim: Features of one head.
        qkv: Children that make queries, keys and values: one that makes all heads of each after another, or one for
            each; none in `nn.MultiheadAttention`, which keeps them as parameters.
        proj: Child that mixes the heads; empty where that is left to whoever reads the attention.
        returns: Entries of the tuple that it returns, the features first; 0 when it returns them alone.
    """

    heads: int
    head_dim: int
    qkv: tuple[str, ...]
    proj: str
    returns: int = 0

    def rows(self, head: int) -> list[int]:
        """The output features of each child of `qkv` that belong to a head."""
        whole, parts = self.heads * self.head_dim, 1 if len(self.qkv) == 3 else 3
        return [part * whole + head * self.head_dim + i for part in range(parts) for i in range(self.head_dim)]

    def kept_rows(self, kept: Iterable[int]) -> list[int]:
        """The output features of each child of `qkv` that are left with these heads, in their order."""
        return sorted(row for head in kept for row in self.rows(head))


def _child(module: nn.Module, names: Sequence[str]) -> str:
    return next((name for name in names if isinstance(getattr(module, name, None), nn.Linear)), "")


def _linear(module: nn.Module, name: str) -> nn.Linear:
    layer = module.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer


def _makers(module: nn.Module) -> tuple[str, ...]:
    """The children that make queries, keys and values; none in a module that has no such children."""
    packed = _child(module, _QKV)
    return (packed,) if packed else next((names for names in _SEPARATE if all(_child(module, [n]) for n in names)), ())


def _mixer(module: nn.Module) -> str:
    """The child that mixes the heads; dropouts may follow it in a sequence."""
    for name in _PROJ:
        child = getattr(module, name, None)
        if isinstance(child, nn.Linear):
            return name
        if isinstance(child, nn.Sequential) and child and isinstance(child[0], nn.Linear):
            return f"{name}.0" if all(isinstance(m, nn.Dropout | nn.Identity) for m in list(child)[1:]) else ""
    return ""


def _count_name(module: nn.Module) -> str:
    return next((name for name in _HEADS if type(getattr(module, name, None)) is int), "")


def head_count(module: nn.Module) -> int | None:
    """Heads of an attention module as its own attribute says; None when it is none."""
    if isinstance(module, nn.MultiheadAttention):
        return module.num_heads
    name, makers = _count_name(module), _makers(module)
    return int(getattr(module, name)) if name and (len(makers) == 3 or (makers and _mixer(module))) else None


def describe(module: nn.Module) -> Attention | None:
    """What is known of a module that is a self-attention of a known layout; None when it is not."""
    heads = head_count(module)
    if not heads:
        return None
    if isinstance(module, nn.MultiheadAttention):
        packed = isinstance(module, SlimMultiheadAttention) or module._qkv_same_embed_dim
        plain = packed and module.bias_k is None and not module.add_zero_attn
        each, rest = divmod(module.out_proj.in_features, heads)
        return Attention(heads, each, (), "out_proj", 2) if plain and not rest else None
    makers, proj = _makers(module), _mixer(module)
    sizes = {(layer.in_features, layer.out_features) for layer in (_linear(module, name) for name in makers)}
    whole, rest = divmod(_linear(module, makers[0]).out_features * len(makers), 3)
    if len(sizes) > 1 or rest or whole % heads or (proj and _linear(module, proj).in_features != whole):
        return None
    return Attention(heads, whole // heads, makers, proj)


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
        like = _linear(module, spec.qkv[0] if spec.qkv else spec.proj)
        inputs = like.in_features if spec.qkv else int(module.embed_dim)  # type: ignore[arg-type]
        setattr(self, VALUE, nn.Linear(inputs, spec.heads * spec.head_dim).to(like.weight.dtype))
        self.mixer = spec.proj.partition(".")[0]
        if self.mixer:
            setattr(self, self.mixer, getattr(module, self.mixer))
        self.returns = spec.returns
        # PyTorch's encoder layers ask their attention for these; the last two keep them off their fused path, which
        # would read weights that are not here.
        self.batch_first = getattr(module, "batch_first", True)
        self._qkv_same_embed_dim, self.in_proj_bias = False, None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Maps (..., features) to the same shape."""
        y = getattr(self, VALUE)(first_tensor(args, kwargs))
        y = getattr(self, self.mixer)(y) if self.mixer else y
        return (y, *[None] * (self.returns - 1)) if self.returns else y


def _same(a: Tensor, b: Tensor | None) -> bool:
    """Whether two tensors hold the same features of the same tokens, in whatever axes these lie."""
    alike = b is not None and a.numel() == b.numel() and a.shape[-1] == b.shape[-1]
    return alike and torch.equal(a.reshape(b.shape), b)  # type: ignore[union-attr, arg-type]


def replaceable(model: nn.Module, example: Tensor) -> dict[str, Attention]:
    """The attentions of which all inputs are one tensor, and the output has its shape (features aside)."""
    fits: dict[str, Attention | None] = {}
    weighted: set[str] = set()
    found = {name: (module, spec) for name, module, spec in attentions(model)}
    passed: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def observer(name: str) -> Any:
        def observe(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            passed.setdefault(name, []).append((first_tensor(args, kwargs), output))

        return observe

    def recorder(name: str) -> Any:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            spec = found[name][1]
            out = output[0] if isinstance(output, tuple) and output else output
            given = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
            x = given[0] if given else None
            same = x is not None and isinstance(out, Tensor) and x.ndim > 2 and x.shape[:-1] == out.shape[:-1]
            if isinstance(module, nn.MultiheadAttention):
                same = same and len(given) == 3 and all(tensor is x for tensor in given)
            elif len(spec.qkv) == 3:  # else it may be the attention of one thing to another, or add something to it
                calls = [passed.pop(f"{name}.{part}", []) for part in (*spec.qkv, spec.proj) if part]
                same = same and all(len(call) == 1 for call in calls)
                same = same and all(_same(call[0][0], x) for call in calls[:3])
                width = spec.heads * spec.head_dim
                same = same and (_same(calls[3][0][1], out) if spec.proj else out.shape[-1] == width)
            if isinstance(output, tuple):
                spec = replace(spec, returns=len(output))
                if any(other is not None for other in output[1:]):
                    weighted.add(name)
            fits[name] = spec if same and fits.get(name, spec) == spec else None

        return record

    hooks = [module.register_forward_hook(recorder(name), with_kwargs=True) for name, (module, _) in found.items()]
    hooks += [
        module.get_submodule(part).register_forward_hook(observer(f"{name}.{part}"), with_kwargs=True)
        for name, (module, spec) in found.items()
        for part in (*spec.qkv, spec.proj)
        if len(spec.qkv) == 3 and part
    ]
    try:
        with torch.no_grad():
            outputs = model(example)
    finally:
        for hook in hooks:
            hook.remove()
    fitting = {name: spec for name, spec in fits.items() if spec is not None}
    read = _weights_read(model, example, outputs, [name for name in fitting if name in weighted])
    return {name: spec for name, spec in fitting.items() if name not in read}


def _weights_read(model: nn.Module, example: Tensor, expected: Any, names: Sequence[str]) -> set[str]:
    """Of attentions that return their weights, as they do unless told otherwise: those whose weights are used."""

    def drop(module: nn.Module, args: Any, output: Any) -> Any:
        return (output[0], *[None] * (len(output) - 1))

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
    return f"{name}.{spec.proj}" if spec is not None and spec.proj else name


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
        spec = Attention(heads, module.head_dim, (), "out_proj")  # its projection may have been cut before
        rows = torch.tensor(spec.kept_rows(kept.tolist()))
        for name in ("in_proj_weight", "in_proj_bias"):
            _keep(module, name, 0, rows)
    else:
        makers = _makers(module)
        now = _linear(module, makers[0]).out_features * len(makers) // 3
        for name in _WIDTHS:
            value = getattr(module, name, None)
            if isinstance(value, int) and value in (now, now * heads // len(kept)):  # it may have been cut before
                setattr(module, name, value // heads * len(kept))
        _cut_tables(module, heads, kept)
    for name in _HEADS:
        if getattr(module, name, None) == heads and type(getattr(module, name)) is int:
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
