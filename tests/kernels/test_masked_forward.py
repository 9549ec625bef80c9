"""The masked forward with the kernel's operator is the Masker's: outputs, gradients, training; and surgery's."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from passdeploy import models
from passdeploy.data.base import Preprocess
from passdeploy.errors import BadInput
from passdeploy.export import export_model, onnx_function
from passdeploy.groups import Groups, Masker, as_masks, find_groups
from passdeploy.groups.check import random_structure
from passdeploy.kernels.geometry import ACTIVATIONS
from passdeploy.kernels.masked_forward import KernelMasker, masked_network, search_masker, trained_input
from passdeploy.kernels.masked_graph import insert_masks, plain_input, trace
from passdeploy.search.prompt import InputStage, Prompted
from passdeploy.surgery import relative_difference, thin

SIZE = 32
OWN: dict[str, Callable[[], nn.Module]] = {}
NETWORKS = ("resnet20", "mobilenet_v3_small", "squeezenet1_1", "pixels", "smooth", "in place", "in place, a function")


class Mixer(nn.Module):
    """A residual block of linear layers over the channels of every pixel, which lie last, as in ConvNeXt."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.wide, self.act, self.back = nn.Linear(channels, 32), nn.GELU(), nn.Linear(32, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.back(self.act(self.wide(x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)


def pixels() -> nn.Module:
    """Channels as many as rows: masked along the wrong dimension it would raise nothing."""
    stem = nn.Sequential(nn.Conv2d(3, 16, 3, stride=1, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1))
    return nn.Sequential(stem, Mixer(16), Mixer(16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


def smooth() -> nn.Module:
    """Activations whose slope times their input isn't what they return, between convolutions."""
    layers: list[nn.Module] = [nn.Conv2d(3, 12, 3, padding=1)]
    for act in (nn.SiLU(), nn.GELU(), nn.ReLU6(), nn.Hardswish()):
        layers += [act, nn.Conv2d(12, 12, 3, padding=1)]
    with torch.no_grad():
        layers[4].weight.mul_(20)  # type: ignore[operator, union-attr]  # ReLU6 is to be reached from above
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10))


class InPlace(nn.Module):
    """What an activation overwrites is read again."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.act = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1), act
        once = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(16, 10, 3))
        self.head = nn.Sequential(once, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(self.b(self.act(x)) + x)


OWN |= {
    "pixels": pixels,
    "smooth": smooth,
    "in place": lambda: InPlace(nn.ReLU(inplace=True)),
    "in place, a function": lambda: InPlace(F.relu_),
}


@cache
def _made(name: str) -> tuple[Prompted, Groups]:
    torch.manual_seed(0)
    network = OWN[name]() if name in OWN else models.build(name, 10)
    for module in network.modules():  # statistics that tell channels apart
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.bias, 0, 0.2)
    groups = find_groups(network.eval(), torch.randn(1, 3, SIZE, SIZE))
    return Prompted(InputStage(Preprocess(size=(SIZE, SIZE)), "additive"), network), groups


def prompted(name: str) -> tuple[Prompted, Groups]:
    """A network of one's own, and its groups."""
    model, groups = _made(name)
    return copy.deepcopy(model), groups


def soft(groups: Groups, seed: int = 0) -> dict[str, Tensor]:
    """Masks of zeros and ones that want a gradient."""
    masks = as_masks(groups.canonical(random_structure(groups, seed)).masks)
    return {name: mask.requires_grad_() for name, mask in masks.items()}


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_and_gradients_are_the_maskers(name: str) -> None:
    model, groups = prompted(name)
    model.eval()
    images = torch.rand(2, 3, SIZE, SIZE)
    kernel, plain = KernelMasker(model, groups, "network."), Masker(model, groups, "network.")
    assert kernel.fused, "nothing was fused"
    found: list[tuple[Tensor, list[Tensor]]] = []
    for masker in (kernel, plain):
        masks = soft(groups)
        logits = masker(masks, images)
        wanted = [*masks.values(), *model.parameters()]
        gradients = torch.autograd.grad(logits.square().sum(), wanted, allow_unused=True)
        found.append(
            (logits, [torch.zeros_like(w) if g is None else g for g, w in zip(gradients, wanted, strict=True)])
        )
    (logits, gradients), (expected, others) = found
    assert relative_difference(expected, logits) <= 1e-5
    largest = max(float(a.abs().max()) for a in others)
    for a, b in zip(others, gradients, strict=True):
        assert (a - b).abs().max() <= 1e-4 * max(1e-3 * largest, float(a.abs().max()))
    hidden = [g for g, mask in zip(gradients, masks.values(), strict=False) if (mask == 0).any()]
    assert any((g[m == 0] != 0).any() for g, m in zip(gradients, masks.values(), strict=False)), hidden


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_masked_activations_gradients_are_pytorchs(activation: str) -> None:
    masks = torch.tensor([1.0, 0.0, 1.0], requires_grad=True)
    x = (4 * torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))).requires_grad_()
    found = []
    for function in (trained_input, plain_input):
        y = function(x, masks, torch.tensor([2, 1, 0]), activation, False)
        found.append((y, *torch.autograd.grad(y.square().sum() + y.sum(), (x, masks))))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected)


class Between(nn.Module):
    """An activation between two convolutions, called as one is told to."""

    def __init__(self, forward: Callable[[Between, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.act, self.b = nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1)
        self.told = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.told(self, self.a(x))


@pytest.mark.parametrize(
    ("forward", "fused"),
    [
        (lambda m, x: m.b(m.act(x)), {"b"}),
        (lambda m, x: m.b(m.act(input=x)), {"b"}),
        (lambda m, x: m.b(m.act(x)) + x, {"b"}),
        (lambda m, x: x.add_(m.b(m.act(x))), set()),  # after the activation, which does not keep its input
        (lambda m, x: x.mul_(2) + m.b(m.act(x)), set()),
        (lambda m, x: m.b(m.act(x)) + F.relu6(x, inplace=True), set()),
        (lambda m, x: m.b(m.act(x)).add_(x), {"b"}),  # something else is overwritten
    ],
)
def test_an_activation_stays_where_its_input_is_overwritten(
    forward: Callable[[nn.Module, Tensor], Tensor], fused: set[str]
) -> None:
    network, images = Between(forward), torch.rand(2, 3, 5, 5)
    graph = trace(network)
    assert insert_masks(graph, {"b": torch.arange(4)}, 4, everywhere=False, function=trained_input) == fused
    expected, got = network(images), graph(images)
    torch.testing.assert_close(got, expected)
    wanted = list(network.parameters())
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), wanted) for y in (got, expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_training_updates_the_models_own_batch_norms() -> None:
    model, groups = prompted("resnet20")
    images = torch.rand(4, 3, SIZE, SIZE)
    states = []
    for kind in (KernelMasker, Masker):
        fresh, _ = prompted("resnet20")
        fresh.train()
        optimiser = torch.optim.SGD(fresh.parameters(), 0.01)
        masker = kind(fresh, groups, "network.")
        for _ in range(2):
            optimiser.zero_grad()
            masker(soft(groups), images).square().mean().backward()
            optimiser.step()
        states.append(fresh.state_dict())
    before = model.state_dict()
    moved = 0
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-3, atol=1e-4)
        moved += not torch.equal(value, before[name])
    assert moved > len(before) / 2


def test_on_a_cpu_a_search_keeps_its_masks_in_the_weights() -> None:
    model, groups = prompted("resnet20")
    assert type(search_masker(model, groups, "network.")) is Masker


class Branching(nn.Module):
    """What it does depends on its input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(y if y.sum() > 0 else -y)


def test_a_network_that_cannot_be_traced_is_named() -> None:
    network = Branching().eval()
    groups = find_groups(network, torch.rand(1, 3, 12, 12))
    with pytest.raises(BadInput, match="cannot be traced"):
        KernelMasker(network, groups)


class Augmented(nn.Module):
    """Changes a tensor that it has by another name, too, and a number, of which the other name keeps the old one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        skip = y = self.a(x)
        y += 1
        y *= 2
        y -= x.mean()
        y /= 3
        images = count = x.shape[0]
        count += 1
        return self.b(F.relu(y) + skip).reshape(images, -1) * count


def test_what_changes_a_tensor_in_place_does_so_in_the_graph() -> None:
    network = Augmented().eval()
    images = torch.rand(2, 3, 12, 12)
    assert torch.equal(trace(network)(images), network(images))


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_masked_network_is_the_thin_one(name: str, plain: bool) -> None:
    model, groups = prompted(name)
    model.eval()
    structure = random_structure(groups, 3)
    images = torch.rand(2, 3, SIZE, SIZE)
    with torch.no_grad():
        masked = masked_network(model, groups, structure, "network.", plain=plain)(images)
        small = Prompted(model.stage, thin(model.network, groups, structure).eval())(images)
    assert relative_difference(small, masked) <= 1e-4


def test_the_plain_masked_network_is_an_onnx_file_with_everything_still_in_it() -> None:
    model, groups = prompted("resnet20")
    model.eval()
    structure = random_structure(groups, 1)
    proto = export_model(masked_network(model, groups, structure, "network.", plain=True), (3, SIZE, SIZE))
    kinds = [node.op_type for node in proto.graph.node]
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    assert kinds.count("Conv") == convolutions, "no block may vanish"
    assert kinds.count("Mul") >= convolutions - 1, "a mask in front of every convolution but the first"
    images = np.random.default_rng(0).random((1, 3, SIZE, SIZE), dtype=np.float32)
    with torch.no_grad():
        expected = Prompted(model.stage, thin(model.network, groups, structure).eval())(torch.from_numpy(images))
    got = torch.from_numpy(onnx_function(proto.SerializeToString())(images))
    assert relative_difference(expected, got) <= 1e-4


@pytest.mark.parametrize("draw", [random.random, np.random.rand, lambda: torch.rand(1).item()])
def test_a_network_that_drops_blocks_at_random_is_not_traced(draw: Callable[[], float]) -> None:
    """One draw would stand for every step: blocks that it dropped would never train."""

    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images if self.training and draw() < 0.5 else self.conv(images)

    model = Dropping()
    with pytest.raises(BadInput, match="draws random numbers in Python"):
        trace(model.train())
    assert trace(model.eval()).graph.nodes


def test_a_functional_dropout_is_no_reason_to_refuse_the_masked_network() -> None:
    class Dropout(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.dropout(self.a(x), 0.5, self.training))

    model, images = Dropout().eval(), torch.rand(2, 3, 12, 12)
    groups = find_groups(model, images[:1])
    structure = random_structure(groups, 0)
    assert (
        relative_difference(
            masked_network(model, groups, structure, plain=True)(images), thin(model, groups, structure)(images)
        )
        < 1e-5
    )
    assert type(search_masker(model.train(), groups)) is Masker
