from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from passdeploy.errors import BadInput
from passdeploy.groups import Groups, check, find_groups
from passdeploy.groups.check import (
    _complement,
    calibrate,
    drop_what_fails,
    masked_against_thin,
    random_structure,
    randomise,
)
from passdeploy.models import build
from passdeploy.structure import Structure
from passdeploy.surgery import thin
from tests.groups.nets import ChannelMixer, DataDependent, Drowned, MadeUp, RandomNet, Untraceable, ready


def _worst(model: nn.Module, groups: Groups, images: torch.Tensor, seeds: int = 4) -> float:
    """The largest difference between masked and thin over random structures, the smallest one among them."""
    smallest = Structure({g.name: (True,) + (False,) * (g.units - 1) for g in groups.groups})
    structures = [smallest, *(random_structure(groups, seed) for seed in range(seeds))]
    return max(masked_against_thin(model, groups, structure, images) for structure in structures)


def test_resnet20() -> None:
    groups = find_groups(build("resnet20", 10), torch.rand(1, 3, 32, 32))
    assert groups.units == {
        "conv1": 16, "depth:layer1.0": 1, "layer1.0.conv1": 16, "depth:layer1.1": 1, "layer1.1.conv1": 16,
        "depth:layer1.2": 1, "layer1.2.conv1": 16, "layer2.0.downsample.0": 32, "layer2.0.conv1": 32,
        "depth:layer2.1": 1, "layer2.1.conv1": 32, "depth:layer2.2": 1, "layer2.2.conv1": 32,
        "layer3.0.downsample.0": 64, "layer3.0.conv1": 64, "depth:layer3.1": 1, "layer3.1.conv1": 64,
        "depth:layer3.2": 1, "layer3.2.conv1": 64,
    }  # fmt: skip
    assert groups.frozen == {"fc": "its channels are the network's outputs"}
    stem = groups.groups[0]
    assert {(m.module, m.side) for m in stem.members} >= {("bn1", "out"), ("layer2.0.conv1", "in"), ("conv1", "out")}
    assert ("conv1", "in") not in {(m.module, m.side) for m in stem.members}


def test_concatenation_offsets() -> None:
    groups = find_groups(ready(MadeUp()), torch.rand(1, 3, 48, 40))
    members = {(m.module, m.side): m for g in groups.groups if g.name == "right" for m in g.members}
    assert members[("norm", "out")].channels == tuple((14 + i,) for i in range(10))
    assert members[("mix", "in")].channels[0] == (14,)
    assert members[("mix", "in")].size == 24


def test_flattened_channels_and_whole_conv_groups() -> None:
    groups = {g.name: g for g in find_groups(ready(MadeUp()), torch.rand(1, 3, 48, 40)).groups}
    flattened = next(m for m in groups["up"].members if m.module == "fc1")
    assert flattened.channels[1] == tuple(range(6, 12))
    grouped = next(m for m in groups["grouped.0"].members if m.module == "grouped.1")
    assert (grouped.side, grouped.channels[3]) == ("out", (12, 13, 14, 15))


def test_the_network_is_left_alone() -> None:
    model = ready(MadeUp()).train()
    model.fc1.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    with torch.no_grad():
        find_groups(model, torch.rand(1, 3, 48, 40))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert not model.fc1.weight.requires_grad
    assert model.stem.weight.requires_grad
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks


@pytest.mark.parametrize(
    ("name", "size", "least"),
    [
        ("resnet18", 64, 17),
        ("mobilenet_v3_small", 64, 30),
        ("squeezenet1_1", 64, 20),
        ("densenet121", 64, 120),
        ("regnet_y_400mf", 64, 40),
        ("googlenet", 64, 50),
    ],
)
def test_families(name: str, size: int, least: int) -> None:
    torch.manual_seed(0)
    kind: Any = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    model = ready(_torchvision(name, **kind) if kind else build(name, 10))
    images = torch.rand(1, 3, size, size)
    groups = find_groups(model, images)
    assert len(groups.groups) >= least
    assert len(groups.frozen) == 1  # the classifier
    assert _worst(model, groups, images, seeds=1) <= 1e-4


def _torchvision(name: str, **kind: Any) -> nn.Module:
    from passdeploy._torchvision import torchvision

    model: nn.Module = torchvision().models.get_model(name, num_classes=10, **kind)
    return model


def test_made_up_network() -> None:
    model, images = ready(MadeUp()), torch.rand(2, 3, 48, 40)
    groups = find_groups(model, images[:1])
    assert groups.names == (
        "stem", "left", "right", "mix", "depth:block", "block.conv1", "block.se.fc.0", "grouped.0", "up", "fc1",
    )  # fmt: skip
    assert _worst(model, groups, images, seeds=8) <= 1e-4


@pytest.mark.parametrize("seed", range(6))  # test_random_graphs.py has many more kinds
def test_random_graphs(seed: int) -> None:
    torch.manual_seed(seed)
    model, images = ready(RandomNet(seed), seed), torch.rand(2, 3, 8, 8)
    assert _worst(model, find_groups(model, images[:1]), images) <= 1e-4


def test_few_groups_of_random_graphs_are_lost() -> None:
    lost = found = 0
    for seed in range(6):
        model, images = ready(RandomNet(seed), seed), torch.rand(1, 3, 8, 8)
        candidates = find_groups(model, images, check=False)
        found += len(candidates.groups)
        lost += len(candidates.groups) - len(find_groups(model, images).groups)
    assert found >= 20
    assert lost <= 0.02 * found


@pytest.mark.parametrize("bad", [{"stem"}, {"stem", "left", "right", "mix", "up"}])
def test_groups_are_frozen_until_the_rest_works(bad: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other: each shows only once the ones before are gone."""
    groups = find_groups(ready(MadeUp()), torch.rand(1, 3, 48, 40), check=False)

    def fails(model: nn.Module, groups: Groups, structure: Structure, example: torch.Tensor, training: bool) -> str:
        first = min(bad & set(groups.names), default=None)
        return "wrong" if first is not None and not all(structure.masks[first]) else ""

    monkeypatch.setattr(check, "_fails", fails)
    left = drop_what_fails(ready(MadeUp()), groups, torch.rand(1, 3, 48, 40))
    assert set(left.names) == set(groups.names) - bad
    assert {name for name, why in left.frozen.items() if why == "wrong"} == bad


def test_what_fails_only_as_a_whole_is_not_pruned(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = ready(MadeUp()), torch.rand(1, 3, 48, 40)
    groups, tried = find_groups(model, images, check=False), itertools.count()
    monkeypatch.setattr(check, "_fails", lambda *_: "wrong" if next(tried) < 6 else "")
    left = drop_what_fails(model, groups, images)
    assert left.groups == ()
    assert left.frozen["channels"] == "masked and thin networks differ"


def test_groups_of_few_units_are_tried_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 1), *(nn.Conv2d(2, 2, 1) for _ in range(8)), nn.Conv2d(2, 5, 1))
    tried: list[Structure] = []
    fails = check._fails

    def record(model: nn.Module, groups: Groups, structure: Structure, example: torch.Tensor, training: bool) -> str:
        tried.append(structure)
        return fails(model, groups, structure, example, training)

    monkeypatch.setattr(check, "_fails", record)
    groups = find_groups(model, torch.rand(1, 3, 4, 4))
    assert len(groups.groups) == 9
    assert len(tried) >= 3
    assert all(structure.widths()[name] == 1 for structure in tried for name in groups.names)


def test_what_mixes_channels_is_frozen_with_a_reason() -> None:
    model, images = ready(ChannelMixer()), torch.rand(2, 3, 12, 12)
    groups = find_groups(model, images[:1])
    assert groups.names == ("a", "c")
    assert groups.frozen["b"] == "the network computes something else without it"
    assert _worst(model, groups, images) <= 1e-4


def test_a_wrong_group_does_not_hide_behind_a_loud_branch() -> None:
    torch.manual_seed(0)
    network, images = Drowned().eval(), torch.rand(2, 3, 16, 16)
    randomise(network)
    calibrate(network, (3, 16, 16))
    groups = find_groups(network, images)
    assert groups.frozen["conv"] == "the network computes something else without it"
    assert "loud.0" in groups.units
    last = Structure({name: (*mask[:-1], False) for name, mask in groups.dense().masks.items()})
    assert masked_against_thin(network, groups, last, images) < 1e-5


def test_calibration_keeps_what_it_can_not_measure() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Unflatten(0, (1, 1)))
    before = copy.deepcopy(network.state_dict())
    calibrate(network.train(), (3, 2, 2))  # can't take four images
    assert not network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    calibrate(network[:3], (3, 2, 2))
    assert network[1].momentum == 0.1
    outputs = network[:2](torch.rand(64, 3, 2, 2))
    assert float(outputs.detach().abs().mean()) < 3


def test_without_symbolic_trace_there_are_no_depth_units() -> None:
    groups = find_groups(ready(DataDependent()), torch.rand(1, 3, 12, 12))
    assert groups.names == ("a",)
    assert groups.frozen["depth"].startswith("the network can't be traced symbolically: ")
    assert "\n" not in groups.frozen["depth"]


def test_untraceable_parts_are_named_and_the_rest_is_pruned() -> None:
    model, images = ready(Untraceable()), torch.rand(2, 3, 9, 7)
    groups = find_groups(model, images[:1])
    assert groups.names == (
        "stem", "depth:block1", "block1.a", "depth:block2", "block2.a", "even.a", "behind",
    )  # fmt: skip
    assert set(groups.frozen) == {"even", "ahead", "fc"}
    assert groups.frozen["even"].startswith("its code can't be traced symbolically, so that no block in it can go: ")
    assert groups.frozen["ahead"] == "the network computes something else without it"
    assert not any("\n" in reason for reason in groups.frozen.values())
    assert _worst(model, groups, images, seeds=4) <= 1e-4


def test_layers_that_the_graph_does_not_come_to_are_named() -> None:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.unused = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(4, 4)
            self.fc = nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.b(self.a(x).detach()).mean((2, 3)))

    model, images = ready(Cut()), torch.rand(2, 3, 9, 7)
    groups = find_groups(model, images[:1])
    assert groups.names == ("b",)
    for name in ("a", "unused"):
        assert groups.frozen[name].startswith("the traced graph does not come to it: ")
    assert _worst(model, groups, images, seeds=2) <= 1e-4


class _Helped(nn.Module):
    """Keeps, in training, outputs of an auxiliary classifier for a loss of its own, or an average of its features.

    A table of rows to look at is a parameter.
    """

    average: Tensor

    def __init__(self, averages: bool) -> None:
        super().__init__()
        self.averages = averages
        self.first, self.second = nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 12, 3)
        self.head = nn.Linear(12, 5)
        self.rows = nn.Parameter(torch.arange(4), requires_grad=False)
        if averages:
            self.register_buffer("average", torch.zeros(8))
        else:
            self.helper = nn.Linear(8, 5)
        self.helped: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        if self.training and self.averages:
            self.average = 0.9 * self.average + 0.1 * x.detach().mean((0, 2, 3))
        elif self.training:
            self.helped = self.helper(x.mean((2, 3)))
        return self.head(self.second(x).relu()[:, :, self.rows].mean((2, 3)))


@pytest.mark.parametrize("averages", [False, True])
def test_what_training_alone_reads_stays(averages: bool) -> None:
    torch.manual_seed(0)
    network, images = _Helped(averages), torch.rand(2, 3, 12, 12)
    groups = find_groups(network, torch.zeros(images.shape))
    assert groups.names == ("second",)
    assert groups.frozen["first"].startswith("the network does not run without it in training: ")
    assert thin(network, groups, Structure({"second": (True, False) * 6})).train()(images).shape == (2, 5)


def test_exclude() -> None:
    groups = find_groups(build("resnet20", 10), torch.rand(1, 3, 32, 32), exclude=["layer3", "layer1.0.conv?"])
    assert not any("layer3" in name for name in groups.names)
    assert "depth:layer2.1" in groups.names
    assert "conv1" not in groups.names  # tied to layer1.0.conv2
    for name in ("layer3.1.conv1", "depth:layer3.1", "depth:layer1.0"):  # a block stays with any of its layers
        assert groups.frozen[name] == "excluded by the user"
    assert "depth:layer2.1" not in groups.frozen


def test_exclude_that_names_nothing() -> None:
    with pytest.raises(BadInput, match="'layr1': names no convolution or linear layer"):
        find_groups(build("resnet20", 10), torch.rand(1, 3, 32, 32), exclude=["layr1"])


def test_an_input_that_does_not_fit() -> None:
    with pytest.raises(BadInput, match=r"can't process an input of shape \(1, 1, 32, 32\)") as caught:
        find_groups(build("resnet20", 10), torch.rand(1, 1, 32, 32))
    assert "\n" not in str(caught.value)


def test_a_channel_that_meets_the_input_stays() -> None:
    class Input(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(6, 8, 3)
            self.fc = nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.b(torch.cat([x, x + self.a(x)], 1))
            return self.fc(x.mean((2, 3)))

    model, images = ready(Input()), torch.rand(1, 3, 8, 8)
    groups = find_groups(model, images)
    assert groups.names == ("depth:a", "b")
    assert groups.frozen["a"] == "its channels are tied to the network's input"
    assert _worst(model, groups, images) <= 1e-4


def test_each_unit_is_dropped_in_one_trial_or_another() -> None:
    """What is kept in all of them was never tried."""
    groups = find_groups(build("resnet20", 10).eval(), torch.zeros(2, 3, 32, 32))
    trial = random_structure(groups, 1, 0.5, 0.0)
    other = _complement(groups, trial)
    for group in groups.groups:
        pairs = list(zip(trial.masks[group.name], other.masks[group.name], strict=True))
        assert any(b for _, b in pairs)
        if group.kind == "depth":
            assert pairs == [(True, True)]
        else:
            assert sum(a and b for a, b in pairs) <= 1
