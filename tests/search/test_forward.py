"""A step on the thin network is the step under the masks: same outputs, gradients and statistics."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from passdeploy.data.base import Preprocess
from passdeploy.groups import Masker, as_masks, find_groups
from passdeploy.groups.check import random_structure
from passdeploy.groups.types import Groups
from passdeploy.models.cifar_resnet import CifarResNet
from passdeploy.placing import place
from passdeploy.search.forward import Forward, Thinned, kept_indices
from passdeploy.search.prompt import InputStage, Prompted
from passdeploy.structure import Structure
from passdeploy.surgery import numbered, relative_difference
from passdeploy.surgery import thin as cut
from tests.groups.nets import MadeUp, ready
from tests.groups.test_random_graphs import QUIET, SIDE, Graph, Step, steps
from tests.groups.test_wrapped import Aliased

CLOSE = 2e-4
"""Of the largest: sums are taken in another order."""


def prompted(network: nn.Module, size: tuple[int, int]) -> Prompted:
    """In training, its statistics moving."""
    model = Prompted(InputStage(Preprocess(size), "additive", 2), network).train()
    assert model.stage.prompt is not None
    nn.init.normal_(model.stage.prompt, std=0.1)
    laid_out(model, size)
    return model


def laid_out(model: Prompted, size: tuple[int, int]) -> torch.memory_format:
    return place(model, torch.device("cpu"), (3, *size))


def trained(model: Prompted, outputs: Callable[[Prompted], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Outputs in training, and the gradients that they leave."""
    y = outputs(model)
    model.zero_grad()
    (y.square().sum() + y.sum()).backward()
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    return y.detach(), gradients


def assert_same_step(network: nn.Module, groups: Groups, structure: Structure, images: Tensor, runs: int = 1) -> None:
    """Also the `runs`-th time; buffers move each time, what is trained stays."""
    size = (images.shape[2], images.shape[3])
    thin_model = prompted(copy.deepcopy(network), size)
    masked_model = copy.deepcopy(thin_model)
    masks = as_masks(groups.canonical(structure).masks)
    thinned = Thinned(thin_model, numbered(network), groups, structure, laid_out(thin_model, size))
    for _ in range(runs - 1):
        trained(masked_model, lambda m: Masker(m, groups, "network.")(masks, images))
        trained(thin_model, lambda _: thinned(images))
    masked, expected = trained(masked_model, lambda m: Masker(m, groups, "network.")(masks, images))
    thin, found = trained(thin_model, lambda _: thinned(images))
    assert relative_difference(masked, thin) <= CLOSE
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        assert float((gradient - found[name]).abs().max()) <= CLOSE * max(largest, 1e-6), name
    moved = [copy.deepcopy(network) for _ in range(2)]
    for blank, model in zip(moved, (masked_model, thin_model), strict=True):
        blank.load_state_dict(model.network.state_dict())
    expected = dict(cut(moved[0], groups, structure).named_buffers())
    for name, value in cut(moved[1], groups, structure).named_buffers():
        assert torch.allclose(value.double(), expected[name].double(), rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("seed", range(4))
def test_of_a_network_of_everything(seed: int) -> None:
    model, images = ready(MadeUp(), seed), torch.rand(4, 3, 48, 40)
    groups = find_groups(model, images[:1])
    assert_same_step(model, groups, random_structure(groups, seed), images)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=QUIET)
@given(steps, st.integers(0, 100))
def test_of_random_graphs(described: list[Step], seed: int) -> None:
    torch.manual_seed(seed)
    model, images = ready(Graph(described), seed), torch.rand(4, 3, SIDE, SIDE)
    groups = find_groups(model, images[:1])
    assert_same_step(model, groups, random_structure(groups, seed), images)


def resnet() -> tuple[Prompted, Groups]:
    torch.manual_seed(0)
    network = ready(CifarResNet((2, 1, 1), 3, (8, 16, 16)))
    return prompted(network, (16, 16)), find_groups(network, torch.zeros(2, 3, 16, 16))


def test_what_is_trained_is_the_dense_networks() -> None:
    """A step changes what is kept, and of a removed block nothing, its statistics included."""
    model, groups = resnet()
    block = next(group for group in groups.groups if group.kind == "depth")
    kept = Structure({**groups.dense().masks, block.name: (False,)})
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    forward = Forward(model, groups, laid_out(model, (16, 16)))
    forward.kept(tuple(as_masks(kept.masks).values()), torch.rand(4, 3, 16, 16)).square().sum().backward()
    optimiser.step()
    changed = {name for name, value in model.network.state_dict().items() if not torch.equal(value, before[name])}
    inside = {name for name in before if name.rpartition(".")[0] in block.branch}
    assert inside and not inside & changed
    assert {name for name in before if not name.endswith("conv.weight")} - inside <= changed | {"fc.bias"}


def test_a_thin_network_is_made_again_when_the_masks_are_others(monkeypatch: pytest.MonkeyPatch) -> None:
    from passdeploy.search import forward as module

    model, groups = resnet()
    made: list[Structure] = []

    class Counted(Thinned):
        def __init__(self, *given: Any) -> None:
            made.append(given[3])
            super().__init__(*given)

    monkeypatch.setattr(module, "Thinned", Counted)
    forward, images = Forward(model, groups, laid_out(model, (16, 16))), torch.rand(2, 3, 16, 16)
    one, other = (tuple(as_masks(random_structure(groups, seed).masks).values()) for seed in (0, 1))
    for which, masks in (
        (0, one),
        (0, tuple(mask.clone() for mask in one)),
        (1, other),
        (0, one),
        (1, one),
        (0, other),
    ):
        assert relative_difference(forward.masked(masks, images), forward.kept(masks, images, which)) <= CLOSE
    assert len(made) == 4


class Own(nn.Module):
    """Moves a buffer by assigning it, keeps what it has seen, and may be run again in the backward pass."""

    average: Tensor

    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.checkpointed, self.seen = checkpointed, torch.zeros(())
        self.stem, self.mix, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3), nn.Linear(12, 3)
        self.register_buffer("average", torch.zeros(()))

    def body(self, x: Tensor) -> Tensor:
        return self.mix(torch.relu(self.stem(x)))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = y = checkpoint(self.body, x, use_reentrant=False) if self.checkpointed else self.body(x)
        if self.training:
            self.average = 0.9 * self.average + 0.1 * x.detach().abs().mean()
        return self.head(torch.relu(y).mean((2, 3)))


def test_of_a_network_that_keeps_what_it_has_seen() -> None:
    """What a training step leaves behind can't be copied."""
    network, images = ready(Own(checkpointed=False)), torch.rand(4, 3, 12, 12)
    groups = find_groups(network, images[:1])
    assert_same_step(network, groups, random_structure(groups, 1), images, runs=3)
    model = prompted(network, (12, 12))
    forward = Forward(model, groups, laid_out(model, (12, 12)))
    for seed in range(2):
        masks = tuple(as_masks(random_structure(groups, seed).masks).values())
        forward.masked(masks, images).sum().backward()
        forward.kept(masks, images).sum().backward()


def test_of_a_network_that_is_run_again_in_the_backward_pass() -> None:
    """With the weights of that step, and not with those of the one that it was made in."""
    images = torch.rand(4, 3, 12, 12)
    plain, again = ready(Own(checkpointed=False)), ready(Own(checkpointed=True))
    again.load_state_dict(plain.state_dict())
    groups = find_groups(plain, images[:1])
    structure, gradients = random_structure(groups, 1), []
    for network in (plain, again):
        torch.manual_seed(0)
        model = prompted(network, (12, 12))
        thinned = Thinned(model, numbered(network), groups, structure, laid_out(model, (12, 12)))
        for _ in range(2):
            _, found = trained(model, lambda _, step=thinned: step(images))  # type: ignore[misc]
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.1 * (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        gradients.append(found)
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-4, atol=1e-6), name


def test_of_modules_of_two_names() -> None:
    network, images = ready(Aliased()), torch.rand(4, 3, 12, 10)
    groups = find_groups(network, images[:1])
    for seed in range(3):
        assert_same_step(network, groups, random_structure(groups, seed), images, runs=2)


def test_cuts_are_found_by_dimension() -> None:
    numbered = torch.arange(4 * 5 * 2, dtype=torch.float64).view(4, 5, 2)
    cut = numbered[[0, 3]][:, [1, 2, 4]]
    found = {dimension: index.tolist() for dimension, index in kept_indices(numbered.shape, cut)}
    assert found == {0: [0, 3], 1: [1, 2, 4]}
    with pytest.raises(ValueError, match="not cut along"):
        kept_indices(numbered.shape, cut.flip(0).roll(1, 2).cumsum(0))
