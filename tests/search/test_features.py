"""Where the dense network's features are matched, and what the distance says."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from passdeploy.groups import Masker, find_groups
from passdeploy.kernels.masked_forward import KernelMasker
from passdeploy.search.features import MOST, FeatureMatch, points_of
from passdeploy.search.method import SearchContext
from passdeploy.search.prompt import InputStage, Prompted
from passdeploy.teacher import Teacher
from tests.search import test_baselines

context = test_baselines.context


def parts(context: SearchContext, kind: type[Masker] = Masker) -> tuple[Prompted, Masker, Teacher, FeatureMatch]:
    dense = Prompted(InputStage(context.data.preprocess), context.network)
    model = copy.deepcopy(dense).eval()
    masker = kind(model, context.groups, "network.")
    teacher = Teacher(dense, torch.device("cpu"), context.data.input_shape)
    return model, masker, teacher, FeatureMatch(masker, teacher, context.groups, "network.")


def ones(context: SearchContext) -> dict[str, torch.Tensor]:
    return {group.name: torch.ones(group.units, requires_grad=True) for group in context.groups.groups}


def images(context: SearchContext) -> torch.Tensor:
    return context.data.train.images(torch.arange(16))


def test_features_are_taken_where_streams_end(context: SearchContext) -> None:
    """A ResNet of three stages: what the second and third stage read, and the classifier."""
    points = points_of(context.network, context.groups)
    assert [point.member.module for point in points][:2] == ["layer2.0.downsample.0", "layer3.0.downsample.0"]


def test_a_chain_without_streams_is_matched_at_all_its_groups_but_not_at_more_than_a_few() -> None:
    layers: list[nn.Module] = [nn.Conv2d(3, 8, 3, padding=1)]
    for _ in range(12):
        layers += [nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)]
    chain = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    groups = find_groups(chain, torch.zeros(2, 3, 8, 8))
    points = points_of(chain, groups)
    assert len(points) == MOST < len(groups.groups)
    assert points[0].group is groups.groups[0] and points[-1].group is groups.groups[-1]


def test_the_distance_is_zero_for_the_dense_network_and_grows_with_what_is_wrong(context: SearchContext) -> None:
    model, masker, teacher, match = parts(context)
    distances = []
    for noise in (0.0, 0.01, 0.1):
        for parameter in model.network.conv1.parameters():
            parameter.data.add_(noise * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
        masks = ones(context)
        teacher(images(context)), masker(masks, images(context))
        distances.append(match(masks).item())
    assert distances[0] < 1e-6 < distances[1] < distances[2]


def test_removed_channels_are_not_matched_and_kept_ones_teach_the_weights(context: SearchContext) -> None:
    model, masker, teacher, match = parts(context)
    point = match.points[0]
    masks = ones(context)
    cut = torch.ones(point.group.units)
    cut[::2] = 0
    masks[point.group.name] = cut
    # What the removed channels of the stem compute must not matter where the stem's stream is read.
    teacher(images(context)), masker(masks, images(context))
    before = match(masks)
    before.backward()
    assert any(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())
    _, masker_too, _, alone = parts(context)
    alone.points = alone.points[:1]
    distances = []
    for shift in (0.0, 5.0):
        masker_too.model.get_submodule("network.bn1").bias.data[0] += shift
        teacher(images(context)), masker_too(masks, images(context))
        distances.append(alone(masks).item())
    assert cut[0] == 0 and point.group.name == "conv1"
    assert distances[0] == pytest.approx(distances[1], abs=1e-6)


def test_a_network_whose_activations_are_masked_gives_the_same_distance_and_gradients(context: SearchContext) -> None:
    """What a search on CUDA runs masks activations instead of weights."""
    found = []
    for kind in (Masker, KernelMasker):
        _, masker, teacher, match = parts(context, kind)
        masks = ones(context)
        hard = {
            name: (torch.arange(len(m)) % 3 != 0).float() if len(m) > 1 else torch.ones(1) for name, m in masks.items()
        }
        through = {name: hard[name] + mask - mask.detach() for name, mask in masks.items()}
        teacher(images(context)), masker(through, images(context))
        distance = match(through)
        distance.backward()
        gradients = torch.cat([m.grad if m.grad is not None else torch.zeros_like(m) for m in masks.values()])
        found.append((distance.item(), gradients))
    (a, ga), (b, gb) = found
    assert a > 1e-4 and a == pytest.approx(b, rel=1e-4)
    assert torch.allclose(ga, gb, atol=1e-4 * float(ga.abs().max()))


class _Concatenating(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 16, 3, padding=1)
        self.last = nn.Conv2d(24, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.cat([self.one(x).relu(), self.two(x).relu()], 1)).mean((2, 3))


def test_what_reads_two_groups_is_matched_on_both(context: SearchContext) -> None:
    torch.manual_seed(0)
    network = _Concatenating().eval()
    groups = find_groups(network, torch.zeros(2, 3, 8, 8))
    dense = Prompted(InputStage(context.data.preprocess), network)
    masker = Masker(copy.deepcopy(dense), groups, "network.")
    teacher = Teacher(dense, torch.device("cpu"), context.data.input_shape)
    match = FeatureMatch(masker, teacher, groups, "network.")
    assert [point.member.module for point in match.points] == ["last", "last"]
    masker.model.get_submodule("network.two").bias.data += 1.0
    masks = {group.name: torch.ones(group.units) for group in groups.groups}
    teacher(images(context)), masker(masks, images(context))
    assert match(masks).item() > 1e-3
