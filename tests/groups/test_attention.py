from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from passdeploy._torchvision import torchvision
from passdeploy.groups import find_groups, macs, operators
from passdeploy.groups.attention_cut import slim_kind
from passdeploy.groups.check import masked_against_thin, random_structure
from passdeploy.onnx_export import export_model
from passdeploy.structure import Structure
from passdeploy.surgery import apply_architecture, architecture, relative_difference, thin
from tests.groups.nets import ready


class Own(nn.Module):
    """Attention as people write it: the width of a head is an attribute, a bias per head, queries scaled."""

    def __init__(self, dim: int, heads: int, pinned: bool = True) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.pinned = heads, dim // heads, pinned
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.bias = nn.Parameter(torch.rand(heads, 1, 1))

    def forward(self, x: Tensor, mask: None = None) -> Tensor:
        n, tokens, dim = x.shape
        each = self.head_dim if self.pinned else dim // self.num_heads
        q, k, v = self.qkv(x).reshape(n, tokens, 3, self.num_heads, each).permute(2, 0, 3, 1, 4).unbind(0)
        weights = ((q * each**-0.5) @ k.transpose(-2, -1) * self.bias).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(n, tokens, -1))


class Tokens(nn.Module):
    """A transformer of two blocks over patches, with a class token and positions."""

    def __init__(self, attention: str = "own", dim: int = 24, heads: int = 4) -> None:
        super().__init__()
        self.kind = attention
        self.patch = nn.Conv2d(3, dim, 4, stride=4)
        self.token, self.position = nn.Parameter(torch.rand(1, 1, dim)), nn.Parameter(torch.rand(1, 17, dim))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(4))
        self.attentions = nn.ModuleList(self._attention(attention, dim, heads) for _ in range(2))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)) for _ in range(2)
        )
        self.head = nn.Linear(dim, 5)

    @staticmethod
    def _attention(kind: str, dim: int, heads: int) -> nn.Module:
        if kind in ("torch", "by name", "by default", "weights read"):
            return nn.MultiheadAttention(dim, heads, batch_first=True)
        return Own(dim, heads, pinned=kind != "unpinned")

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        for i, (attention, mlp) in enumerate(zip(self.attentions, self.mlps, strict=True)):
            y = self.norms[2 * i](x)
            if self.kind == "torch":
                y, _ = attention(y, y, y, need_weights=False)
            elif self.kind == "by name":
                y, _ = attention(key_padding_mask=None, query=y, key=y, value=y, need_weights=False)
            elif self.kind == "by default":  # which returns the weights, for nobody
                y = attention(y, y, y)[0]
            elif self.kind == "weights read":
                y, weights = attention(y, y, y)
                y = y * weights.amax()
            elif self.kind == "own by name":
                y = attention(mask=None, x=y)
            else:
                y = attention(y)
            x = x + y
            x = x + mlp(self.norms[2 * i + 1](x))
        return self.head(x[:, 0])


def _swin(version: int) -> nn.Module:
    models = torchvision().models.swin_transformer
    more: dict[str, Any] = {}
    if version == 2:
        more = {"block": models.SwinTransformerBlockV2, "downsample_layer": models.PatchMergingV2}
    network: nn.Module = models.SwinTransformer(
        [4, 4], 24, [2, 2], [3, 6], [4, 4], stochastic_depth_prob=0.1, num_classes=5, **more
    )
    return network


def _maxvit() -> nn.Module:
    network: nn.Module = torchvision().models.MaxVit((32, 32), 16, 4, [16, 32], [1, 1], 8, 0.0, num_classes=5)
    return network


NETWORKS = {
    "own": lambda: Tokens("own"),
    "multihead": lambda: Tokens("torch"),
    "by name": lambda: Tokens("by name"),
    "own by name": lambda: Tokens("own by name"),
    "swin": lambda: _swin(1),
    "swin v2": lambda: _swin(2),
    "maxvit": _maxvit,
}
SIZES = {"own": 16, "multihead": 16, "by name": 16, "own by name": 16, "swin": 36, "swin v2": 36, "maxvit": 32}


@pytest.mark.parametrize("name", NETWORKS)
def test_heads_go_whole_and_masked_equals_thin(name: str) -> None:
    torch.manual_seed(0)
    model, images = ready(NETWORKS[name]()), torch.rand(2, 3, SIZES[name], SIZES[name])
    groups = find_groups(model, images[:1])
    heads = [g for g in groups.groups if any(m.module == g.name and m.side == "out" for m in g.members) and g.units < 7]
    assert len(heads) >= 2, groups.frozen
    smallest = Structure({g.name: (True,) + (False,) * (g.units - 1) for g in groups.groups})
    for structure in (smallest, *(random_structure(groups, seed) for seed in range(4))):
        assert masked_against_thin(model, groups, structure, images) <= 1e-4
        cut = thin(model, groups, structure)
        again = apply_architecture(NETWORKS[name](), architecture(groups, structure))
        again.load_state_dict(cut.state_dict())
        with torch.no_grad():
            assert torch.equal(again.eval()(images), cut.eval()(images))


@pytest.mark.parametrize("name", ["own", "own by name", "multihead", "by name", "swin"])
def test_blocks_of_a_transformer_are_depth_units(name: str) -> None:
    model = ready(NETWORKS[name]())
    groups = find_groups(model, torch.rand(1, 3, SIZES[name], SIZES[name]))
    assert sum(g.kind == "depth" for g in groups.groups) == (8 if name == "swin" else 4)


def test_what_can_not_lose_heads_keeps_them() -> None:
    model = ready(Tokens("unpinned"))
    groups = find_groups(model, torch.rand(1, 3, 16, 16))
    assert {"mlps.0.0", "mlps.1.0"} <= set(groups.names)
    assert not any(name.startswith("attentions") for name in groups.names)
    assert "attentions.0" in groups.frozen


def test_attention_weights_that_nobody_reads_keep_no_head() -> None:
    images = torch.rand(1, 3, 16, 16)
    groups = find_groups(ready(Tokens("by default")), images)
    assert {"attentions.0", "attentions.1"} <= set(groups.names), groups.frozen
    assert sum(g.kind == "depth" for g in groups.groups) == 4
    read = find_groups(ready(Tokens("weights read")), images)
    assert not any(name.startswith("attentions") for name in read.names)
    assert "its weights are read" in read.frozen["attentions.0.out_proj"]


class OwnForward(nn.MultiheadAttention):
    """Computes something else than its base class."""

    def forward(self, *given: Tensor, **options: object) -> tuple[Tensor, None]:  # type: ignore[override]
        return 2 * super().forward(*given, need_weights=False)[0], None


def test_an_attention_with_a_forward_of_its_own_is_none_that_is_known() -> None:
    model, images = Tokens("torch"), torch.rand(1, 3, 16, 16)
    for i in range(2):
        own = OwnForward(24, 4, batch_first=True)
        own.load_state_dict(model.attentions[i].state_dict())
        model.attentions[i] = own
    assert slim_kind(model.attentions[0]) is None
    assert slim_kind(nn.MultiheadAttention(24, 4)) == "MultiheadAttention"
    model = ready(model)
    exported = export_model(model, (3, 16, 16))
    session = ort.InferenceSession(exported.SerializeToString(), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        assert np.abs(logits - model(images).numpy()).max() < 1e-4


def test_a_cut_attention_keeps_its_scale_and_can_be_cut_again() -> None:
    model, images = ready(Tokens("torch")), torch.rand(2, 3, 16, 16)
    groups = find_groups(model, images[:1])
    masks = groups.dense().masks | {"attentions.0": (True, False, True, True)}
    cut = thin(model, groups, Structure(masks)).eval()
    attention = cut.get_submodule("attentions.0")
    assert (attention.num_heads, attention.head_dim, attention.out_proj.in_features) == (3, 6, 18)
    second = find_groups(cut, images[:1])
    assert second.units["attentions.0"] == 3
    assert masked_against_thin(cut, second, random_structure(second, 5, skip=0), images) <= 1e-4


class Encoder(nn.Module):
    """PyTorch's own encoder layers over patches."""

    def __init__(self, norm_first: bool, batch_first: bool) -> None:
        super().__init__()
        self.first = batch_first
        self.patch, self.head = nn.Conv2d(3, 16, 4, stride=4), nn.Linear(16, 5)
        layer = nn.TransformerEncoderLayer(16, 4, 32, 0.0, batch_first=batch_first, norm_first=norm_first)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        if self.first:
            return self.head(self.layers(tokens).mean(1))
        return self.head(self.layers(tokens.transpose(0, 1)).mean(0))


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_encoder_layers_of_torch(norm_first: bool, batch_first: bool) -> None:
    torch.manual_seed(0)
    model, images = ready(Encoder(norm_first, batch_first)), torch.rand(2, 3, 16, 16)
    groups = find_groups(model, images[:1])
    assert groups.names == tuple(f"layers.layers.{i}.{part}" for i in range(2) for part in ("self_attn", "linear1")), (
        groups.frozen
    )
    for seed in range(4):
        structure = random_structure(groups, seed)
        assert masked_against_thin(model, groups, structure, images) <= 1e-4
    again = find_groups(thin(model, groups, structure), images[:1])
    assert set(again.names) <= set(groups.names)
    assert set(again.names) >= {name for name, mask in structure.masks.items() if sum(mask) > 1}


def test_layers_that_an_attention_does_not_call_are_counted() -> None:
    model, example = ready(Tokens("torch")), torch.rand(1, 3, 16, 16)
    own = ready(Tokens("own"))
    groups = find_groups(model, example)
    assert macs(operators(model, example, groups)) == macs(operators(own, example, find_groups(own, example)))
    index = groups.names.index("attentions.0")
    packed = next(op for op in operators(model, example, groups) if op.name == "attentions.0.in_proj")
    assert (packed.cout, packed.out_units, packed.in_hw) == (72, ((index, 18),), (17, 1))


def test_an_attention_that_runs_twice_is_counted_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.attention = nn.Conv2d(3, 8, 4, stride=4), nn.MultiheadAttention(8, 2, batch_first=True)
            self.head = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.patches(x).flatten(2).transpose(1, 2)
            for _ in range(2):
                x = x + self.attention(x, x, x, need_weights=False)[0]
            return self.head(x.mean(1))

    model, images = ready(Twice()), torch.rand(1, 3, 16, 16)
    names = [op.name for op in operators(model, images, find_groups(model, images))]
    assert names.count("attention.in_proj") == names.count("attention.out_proj") == 2


def test_cross_attention_is_left_alone() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 4, stride=4), nn.Conv2d(3, 8, 4, stride=4)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.wide, self.head = nn.Linear(8, 16), nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            a, b = (layer(x).flatten(2).transpose(1, 2) for layer in (self.a, self.b))
            return self.head(F.relu(self.wide(self.attention(a, b, b)[0]))).mean(1)

    model, images = ready(Cross()), torch.rand(2, 3, 16, 16)
    groups = find_groups(model, images[:1])
    assert groups.names == ("wide",)
    assert masked_against_thin(model, groups, random_structure(groups, 0), images) <= 1e-4


def test_exported_thin_attention_equals_torch() -> None:
    from passdeploy.export import export_model, onnx_function

    model, images = ready(Tokens("torch")), torch.rand(1, 3, 16, 16)
    groups = find_groups(model, images)
    cut = thin(model, groups, random_structure(groups, 1)).eval()
    got = onnx_function(export_model(cut, (3, 16, 16)).SerializeToString())(images.numpy())
    with torch.no_grad():
        assert relative_difference(cut(images), torch.from_numpy(got)) <= 1e-4


def test_heads_are_ranked_by_all_their_weights() -> None:
    from passdeploy.search.baselines.magnitudes import slices
    from passdeploy.search.statistics import collect

    model = ready(Tokens("torch"))
    attention: Any = model.get_submodule("attentions.0")
    with torch.no_grad():
        rows = [part * 24 + 6 + i for part in range(3) for i in range(6)]  # the second of four heads
        attention.in_proj_weight[rows] *= 100
    groups = find_groups(model, torch.rand(1, 3, 16, 16))
    group = groups.groups[groups.names.index("attentions.0")]
    first = next(values for side, _, values in slices(model, group) if side == "out")
    assert first.shape == (4, 3 * 6 * 24)
    assert int(first.abs().sum(1).argmax()) == 1
    zeros = {name: torch.zeros(units) for name, units in groups.units.items()}
    statistics = collect(model, groups, zeros, torch.zeros(len(groups.groups)))
    assert int(statistics.magnitude[groups.names.index("attentions.0")].argmax()) == 1


def test_no_exported_attention_has_an_einsum() -> None:
    from passdeploy.export import export_model, onnx_function

    model, images = ready(_maxvit()), torch.rand(1, 3, 32, 32)
    proto = export_model(model, (3, 32, 32))
    assert "Einsum" not in {node.op_type for node in proto.graph.node}
    with torch.no_grad():
        got = torch.from_numpy(onnx_function(proto.SerializeToString())(images.numpy()))
        assert relative_difference(model(images), got) <= 1e-4
