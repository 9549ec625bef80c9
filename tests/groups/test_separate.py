"""Attention whose queries, keys and values are made by layers of their own, as many libraries and people write it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from passdeploy.export import OnnxSlicer, onnx_function
from passdeploy.groups import find_groups, macs, operators
from passdeploy.groups.attention import describe
from passdeploy.groups.check import masked_against_thin, random_structure
from passdeploy.structure import Structure
from passdeploy.surgery import relative_difference, thin
from tests.groups.nets import cut_and_built_anew, ready

DIM, HEADS, EACH = 24, 4, 6
SHAPE = (3, 16, 16)


class Library(nn.Module):
    """As in Hugging Face's vision transformers since version 5: a tuple is returned, the weights in it if wanted."""

    def __init__(self, weights: bool = False) -> None:
        super().__init__()
        self.num_attention_heads, self.head_dim, self.weights = HEADS, EACH, weights
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM, False), nn.Linear(DIM, DIM)
        self.o_proj = nn.Linear(DIM, DIM)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (part(hidden_states).view(shape).transpose(1, 2) for part in (self.q_proj, self.k_proj, self.v_proj))
        weights = (q @ k.transpose(-2, -1) * self.head_dim**-0.5).softmax(-1)
        y = self.o_proj((weights @ v).transpose(1, 2).reshape(*hidden_states.shape[:-1], -1))
        return y, weights if self.weights else None


class _Heads(nn.Module):
    """The older form: the projection lies elsewhere, and the width of all heads is an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.num_attention_heads, self.attention_head_size, self.all_head_size = HEADS, EACH, DIM
        self.query, self.key, self.value = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        q, k, v = (
            part(x).view(*x.shape[:-1], self.num_attention_heads, self.attention_head_size).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        y = F.scaled_dot_product_attention(q, k, v).permute(0, 2, 1, 3).contiguous()
        return (y.view(*y.shape[:-2], self.all_head_size),)


class Older(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.output = _Heads(), nn.ModuleDict({"dense": nn.Linear(DIM, DIM)})

    def forward(self, x: Tensor) -> Tensor:
        return self.output["dense"](self.attention(x)[0])


class Newer(Older):
    """Its attention returns the weights as well, or None."""

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.attention(x)
        return self.output["dense"](y)


class _Pair(_Heads):
    def forward(self, x: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return super().forward(x)[0], None


def _newer() -> nn.Module:
    layer = Newer()
    layer.attention = _Pair()
    return layer


class Own(nn.Module):
    """An own module: a bias per head, dropout in a sequence behind the projection, what it is given by three names."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.dim = HEADS, DIM
        self.to_q, self.to_k, self.to_v = (nn.Linear(DIM, DIM, False) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(DIM, DIM), nn.Dropout(0.1))
        self.bias = nn.Parameter(torch.rand(HEADS, 1, 1))

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        n, tokens = queries.shape[:2]
        q, k, v = (
            layer(x).reshape(n, -1, self.heads, self.dim // self.heads).transpose(1, 2)
            for layer, x in ((self.to_q, queries), (self.to_k, keys), (self.to_v, values))
        )
        weights = (q @ k.transpose(-2, -1) * self.bias).softmax(-1)
        return self.to_out((weights @ v).transpose(1, 2).reshape(n, tokens, self.dim))


class Layer(nn.Module):
    """A transformer's block around an attention, which `call` is told how to call."""

    def __init__(self, attention: nn.Module, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attention, self.call = nn.LayerNorm(DIM), nn.LayerNorm(DIM), attention, call
        self.mlp = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.call(self.attention, self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Vision(nn.Module):
    """Two blocks over patches."""

    def __init__(self, attention: Callable[[], nn.Module], call: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, DIM, 4, stride=4)
        self.layers = nn.Sequential(*(Layer(attention(), call) for _ in range(2)))
        self.head = nn.Linear(DIM, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.patch(x).flatten(2).transpose(1, 2)).mean(1))


def _unpacked(attention: Any, x: Tensor) -> Tensor:
    y, _ = attention(x)
    result: Tensor = y
    return result


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "library": lambda: Vision(Library, _unpacked),
    "weights": lambda: Vision(lambda: Library(weights=True), lambda attention, x: attention(x)[0]),
    "older": lambda: Vision(Older, lambda attention, x: attention(x)),
    "newer": lambda: Vision(_newer, lambda attention, x: attention(x)),
    "own": lambda: Vision(Own, lambda attention, x: attention(x, x, x)),
}
NAMES = dict.fromkeys(NETWORKS, "attention") | dict.fromkeys(("older", "newer"), "attention.attention")


@pytest.mark.parametrize("name", NETWORKS)
def test_heads_of_separate_layers_go_whole(name: str) -> None:
    torch.manual_seed(0)
    model, images = ready(NETWORKS[name]()), torch.rand(2, *SHAPE)
    groups = find_groups(model, images[:1])
    names = [f"layers.{i}.{NAMES[name]}" for i in range(2)]
    assert {n: groups.units.get(n) for n in names} == dict.fromkeys(names, HEADS), groups.frozen
    # what is left of an attention that does not mix its heads itself is no zero of a block
    assert sum(g.kind == "depth" for g in groups.groups) == 4
    of_heads = {(m.module, m.side): m for g in groups.groups if g.name == names[0] for m in g.members}
    spec = describe(model.get_submodule(names[0]))
    assert spec is not None
    for part in spec.qkv:
        assert of_heads[(f"{names[0]}.{part}", "out")].channels[1] == tuple(range(EACH, 2 * EACH))
    assert sum(side == "in" for _, side in of_heads) == 1  # the projection, wherever it is
    smallest = Structure({g.name: (True,) + (False,) * (g.units - 1) for g in groups.groups})
    blockless = {n: m if not n.startswith("depth:") else (False,) for n, m in groups.dense().masks.items()}
    for structure in (smallest, Structure(blockless), *(random_structure(groups, seed) for seed in range(4))):
        cut_and_built_anew(model, NETWORKS[name](), groups, structure, images)


@pytest.mark.parametrize("found_with", [1, 2])
def test_blocks_go_at_any_batch_size(found_with: int) -> None:
    """Two images are no pair of features and weights."""
    torch.manual_seed(0)
    model = ready(NETWORKS["newer"]())
    groups = find_groups(model, torch.rand(found_with, *SHAPE))
    blockless = {n: m if not n.startswith("depth:") else (False,) for n, m in groups.dense().masks.items()}
    assert {g.zero for g in groups.groups if g.kind == "depth"} == {"like", "pairs"}
    for batch in (1, 2, 3):
        assert masked_against_thin(model, groups, Structure(blockless), torch.rand(batch, *SHAPE)) <= 1e-4


@pytest.mark.parametrize("name", ["library", "older", "own"])
def test_separate_layers_are_cut_out_of_one_export(name: str) -> None:
    torch.manual_seed(0)
    model, images = ready(NETWORKS[name]()), torch.rand(1, *SHAPE)
    groups = find_groups(model, images)
    cutter = OnnxSlicer(model, groups, SHAPE, prefix="")
    assert cutter.exact, cutter.reason
    smallest = {g.name: (True,) + (False,) * (g.units - 1) for g in groups.groups}
    for structure in (Structure(smallest), groups.dense(), *(random_structure(groups, seed) for seed in range(3))):
        with torch.no_grad():
            expected = thin(model, groups, structure)(images)
        got = torch.from_numpy(onnx_function(cutter.slice(structure))(images.numpy()))
        assert relative_difference(expected, got) <= 1e-4


def test_a_cut_one_can_be_cut_again() -> None:
    model, images = ready(NETWORKS["own"]()), torch.rand(2, *SHAPE)
    groups = find_groups(model, images[:1])
    name = "layers.0.attention"
    cut = thin(model, groups, Structure(groups.dense().masks | {name: (True, False, True, True)})).eval()
    attention = cut.get_submodule(name)
    assert (attention.heads, attention.dim, attention.to_q.out_features) == (3, 18, 18)
    assert tuple(attention.bias.shape) == (3, 1, 1)
    second = find_groups(cut, images[:1])
    assert second.units[name] == 3
    assert masked_against_thin(cut, second, random_structure(second, 5, skip=0), images) <= 1e-4


def test_separate_layers_cost_what_they_do() -> None:
    model, example = ready(NETWORKS["library"]()), torch.rand(1, *SHAPE)
    groups = find_groups(model, example)
    ops = operators(model, example, groups)
    index = groups.names.index("layers.0.attention")
    for part in ("q_proj", "k_proj", "v_proj"):
        op = next(op for op in ops if op.name == f"layers.0.attention.{part}")
        assert (op.cout, op.out_units, op.in_hw) == (DIM, ((index, EACH),), (16, 1))
    masks = groups.dense().masks | {"layers.0.attention": (True, False, False, False)}
    cut = thin(model, groups, Structure(masks))
    fewer = [float(sum(mask)) for mask in masks.values()]
    assert macs(ops, fewer) == macs(operators(cut, example, find_groups(cut, example)))


def _reversed(attention: Any, x: Tensor) -> Tensor:
    result: Tensor = attention(x, x.flip(1), x.flip(1))
    return result


class Residual(Own):
    """Adds what it is given to what it computes, so that the channels of both are the same."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return x + super().forward(x, x, x)


class Unpinned(Own):
    """Takes the width of a head from what it is given."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        n, tokens, dim = x.shape
        q, k, v = (
            layer(x).reshape(n, tokens, self.heads, dim // self.heads).transpose(1, 2)
            for layer in (self.to_q, self.to_k, self.to_v)
        )
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, dim))


class Crossed(Own):
    """Features of a head are not next to each other: another layout, of which no head goes."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        n, tokens = x.shape[:2]
        q, k, v = (
            layer(x).reshape(n, tokens, self.dim // self.heads, self.heads).permute(0, 3, 1, 2)
            for layer in (self.to_q, self.to_k, self.to_v)
        )
        y = F.scaled_dot_product_attention(q, k, v).permute(0, 2, 3, 1)
        return self.to_out(y.reshape(n, tokens, self.dim))


@pytest.mark.parametrize(
    ("attention", "call"),
    [(Own, _reversed), (Residual, _unpacked), (Unpinned, _unpacked), (Crossed, _unpacked)],
    ids=["of one thing to another", "with a sum inside", "width from the input", "interleaved heads"],
)
def test_what_is_no_plain_attention_keeps_its_heads(
    attention: Callable[[], nn.Module], call: Callable[[Any, Tensor], Tensor]
) -> None:
    torch.manual_seed(0)
    call = call if attention is Own else lambda module, x: module(x)
    model, images = ready(Vision(attention, call)), torch.rand(2, *SHAPE)
    groups = find_groups(model, images[:1])
    assert {"layers.0.mlp.0", "layers.1.mlp.0"} <= set(groups.names)
    assert not any(
        m.module.endswith((".to_q", ".to_k", ".to_v")) and m.side == "out" for g in groups.groups for m in g.members
    )
    for seed in range(4):
        assert masked_against_thin(model, groups, random_structure(groups, seed), images) <= 1e-4


def test_weights_that_are_read_keep_the_heads() -> None:
    def read(attention: Any, x: Tensor) -> Tensor:
        y, weights = attention(x)
        result: Tensor = y * weights.amax()
        return result

    model, images = ready(Vision(lambda: Library(weights=True), read)), torch.rand(1, *SHAPE)
    groups = find_groups(model, images)
    assert not any(name.endswith("attention") for name in groups.names if not name.startswith("depth:"))
