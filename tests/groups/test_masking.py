from __future__ import annotations

import pytest
import torch

from passdeploy.data.base import Preprocess
from passdeploy.groups import Masker, as_masks, find_groups
from passdeploy.groups.check import random_structure
from passdeploy.search.prompt import InputStage, Prompted
from passdeploy.surgery import relative_difference
from tests.groups.nets import MadeUp, ready


def _ones(units: dict[str, int]) -> dict[str, torch.Tensor]:
    return {name: torch.ones(count, requires_grad=True) for name, count in units.items()}


def test_masks_of_ones_change_nothing() -> None:
    model, images = ready(MadeUp()), torch.rand(2, 3, 48, 40)
    groups = find_groups(model, images[:1])
    assert torch.equal(Masker(model, groups)(_ones(groups.units), images), model(images))


def test_every_mask_has_a_gradient() -> None:
    model, images = ready(MadeUp()), torch.rand(2, 3, 48, 40)
    groups = find_groups(model, images[:1])
    masks = _ones(groups.units)
    Masker(model, groups)(masks, images).square().sum().backward()
    for name, mask in masks.items():
        assert mask.grad is not None, name
        assert mask.grad.abs().sum() > 0, name


def test_the_gradient_is_that_of_scaled_activations() -> None:
    model, images = ready(MadeUp()).double(), torch.rand(2, 3, 48, 40, dtype=torch.float64)
    groups = find_groups(model, images[:1])
    masker = Masker(model, groups)

    def output(mask: torch.Tensor) -> torch.Tensor:
        masks = {name: value.double() for name, value in _ones(groups.units).items()}
        return masker(masks | {"mix": mask}, images).sum()

    start = torch.rand(12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(output, (start,))


def test_in_the_prompted_model() -> None:
    network, images = ready(MadeUp()), torch.rand(2, 3, 48, 40)
    groups = find_groups(network, images[:1])
    masks = as_masks(random_structure(groups, 3).masks)
    model = Prompted(InputStage(Preprocess(size=(48, 40)), "additive", 2), network).eval()
    expected = Masker(network, groups)(masks, model.stage(images))
    assert relative_difference(expected, Masker(model, groups, prefix="network.")(masks, images)) <= 1e-6


def test_given_parameters_are_scaled_instead_of_the_models_own() -> None:
    model, images = ready(MadeUp()), torch.rand(1, 3, 48, 40)
    groups = find_groups(model, images)
    own = {name: torch.full_like(p, 2.0) for name, p in model.named_parameters()}
    changed = Masker(model, groups).parameters(_ones(groups.units), own)
    assert changed
    assert all(bool((value == 2).all()) for value in changed.values())


def test_nothing_is_left_on_the_model() -> None:
    model, images = ready(MadeUp()), torch.rand(1, 3, 48, 40)
    groups = find_groups(model, images)
    before = model(images)
    Masker(model, groups)(as_masks(random_structure(groups, 1).masks), images)
    assert torch.equal(model(images), before)


@pytest.mark.parametrize("missing", ["stem", "depth:block"])
def test_a_missing_mask_is_named(missing: str) -> None:
    model, images = ready(MadeUp()), torch.rand(1, 3, 48, 40)
    groups = find_groups(model, images)
    masks = {name: mask for name, mask in _ones(groups.units).items() if name != missing}
    with pytest.raises(KeyError, match=missing):
        Masker(model, groups).parameters(masks)
