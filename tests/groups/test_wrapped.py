from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

from passdeploy.config import make_config
from passdeploy.errors import BadInput
from passdeploy.groups import as_masks, find_groups, macs, operators
from passdeploy.groups.check import masked_against_thin, random_structure
from passdeploy.kernels.masked_forward import KernelMasker
from passdeploy.structure import Structure
from passdeploy.subject import load_subject
from passdeploy.surgery import relative_difference, thin
from tests import scripted
from tests.groups.nets import MadeUp, PreActivation, Residual, ready

IMAGES = (2, 3, 48, 40)


def _agrees(model: nn.Module, seed: int = 1) -> bool:
    images = torch.rand(IMAGES)
    groups = find_groups(model, images[:1])
    return len(groups.groups) > 5 and masked_against_thin(model, groups, random_structure(groups, seed), images) <= 1e-4


def test_compiled() -> None:
    assert _agrees(torch.compile(ready(MadeUp()), backend="eager"))  # type: ignore[arg-type]


def test_data_parallel() -> None:
    wrapped = nn.DataParallel(ready(MadeUp()))
    assert _agrees(wrapped)
    example = torch.rand(1, 3, 48, 40)
    assert macs(operators(wrapped, example, find_groups(wrapped, example))) > 0


def test_distributed_data_parallel(tmp_path: Path) -> None:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        assert _agrees(nn.parallel.DistributedDataParallel(ready(MadeUp())))
    finally:
        torch.distributed.destroy_process_group()


def test_channels_last() -> None:
    model: nn.Module = ready(MadeUp()).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert _agrees(model)
    images = torch.rand(IMAGES).to(memory_format=torch.channels_last)
    groups = find_groups(model, images[:1])
    cut = thin(model, groups, random_structure(groups, 2))
    with torch.no_grad():
        assert relative_difference(cut(images.contiguous()), cut(images)) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_traced_in_float_and_stay_halves(dtype: torch.dtype) -> None:
    model = ready(MadeUp())
    groups = find_groups(copy.deepcopy(model).to(dtype), torch.rand(1, 3, 48, 40))
    assert groups.units == find_groups(model, torch.rand(1, 3, 48, 40)).units
    cut = thin(model.to(dtype), groups, random_structure(groups, 3))
    assert all(p.dtype is dtype for p in cut.parameters())
    with torch.no_grad():
        assert cut(torch.rand(IMAGES).to(dtype)).isfinite().all()


def test_autocast_scales_the_weights_that_are_used() -> None:
    model, images = ready(MadeUp()), torch.rand(IMAGES)
    groups = find_groups(model, images[:1])
    structure = random_structure(groups, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert masked_against_thin(model, groups, structure, images) <= 0.1
    assert masked_against_thin(model, groups, structure, images) <= 1e-4


def test_dropout_in_training_mode() -> None:
    model, images = ready(PreActivation()), torch.rand(4, 3, 8, 8)
    groups = find_groups(model.train(), images[:1])
    assert model.training
    cut = thin(model, groups, random_structure(groups, 1, skip=0))
    assert cut.training
    cut(images).sum().backward()
    assert all(p.grad is not None for p in cut.parameters())


class Twice(nn.Module):
    """One layer that runs twice, and two layers that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.again = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.a, self.b = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.b.weight = self.a.weight
        self.mix, self.fc = nn.Conv2d(8, 12, 1), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.again(F.relu(self.again(F.relu(self.stem(x))))))
        return self.fc(F.relu(self.mix(self.b(F.relu(self.a(x))))).mean((2, 3)))


def test_shared_weights_stay_shared_and_whole() -> None:
    model, images = ready(Twice()), torch.rand(2, 3, 10, 10)
    groups = find_groups(model, images[:1])
    assert groups.names == ("mix",)
    assert groups.frozen["a"].startswith("it shares a parameter with ")
    cut: Any = thin(model, groups, random_structure(groups, 0))
    assert cut.a.weight is cut.b.weight
    for seed in range(3):
        assert masked_against_thin(model, groups, random_structure(groups, seed), images) <= 1e-4


def test_a_layer_that_runs_twice() -> None:
    class Again(Twice):
        def __init__(self) -> None:
            super().__init__()
            self.b.weight = nn.Parameter(self.b.weight.clone())

    model, images = ready(Again()), torch.rand(2, 3, 10, 10)
    groups = find_groups(model, images[:1])
    assert "mix" in groups.names
    assert any({"again"} <= {m.module for m in g.members} for g in groups.groups)
    for seed in range(3):
        assert masked_against_thin(model, groups, random_structure(groups, seed), images) <= 1e-4


class Aliased(nn.Module):
    """A backbone, and its layers a second time under the names that `forward` uses."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Module()
        self.base.conv1, self.base.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.base.layer1, self.base.layer2 = Residual(8), Residual(8)
        self.layer0 = nn.Sequential(self.base.conv1, self.base.bn1, nn.ReLU())
        self.down1, self.down2, self.fc = self.base.layer1, self.base.layer2, nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.down2(self.down1(self.layer0(x))).mean((2, 3)))


def test_modules_of_two_names() -> None:
    model, images = ready(Aliased()), torch.rand(2, 3, 12, 10)
    before = model(images)
    groups = find_groups(model, images[:1])
    assert {"base.conv1", "depth:base.layer1", "depth:base.layer2"} <= set(groups.names)
    for seed in range(3):
        structure = random_structure(groups, seed)
        assert masked_against_thin(model, groups, structure, images) <= 1e-4
        KernelMasker(model, groups)(as_masks(structure.masks), images)
    assert torch.equal(model(images), before)
    assert all(isinstance(m.weight, nn.Parameter) for m in model.modules() if isinstance(m, nn.Conv2d))


def test_a_removed_module_goes_under_all_its_names() -> None:
    class Listed(Aliased):
        """The block's parts have another parent under their first name than where they run."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
            self.body = nn.Sequential(self.first, self.second)

        def forward(self, x: Tensor) -> Tensor:
            x = self.layer0(x)
            return self.fc((x + self.body(x)).mean((2, 3)))

    model: Any = ready(Listed())
    images = torch.rand(2, 3, 12, 10)
    groups = find_groups(model, images[:1])
    depth = next(group.name for group in groups.groups if group.kind == "depth")
    cut: Any = thin(model, groups, Structure({**groups.dense().masks, depth: (False,)}))
    assert relative_difference(cut(images), model.fc(model.layer0(images).mean((2, 3)))) <= 1e-5


def test_tied_embedding() -> None:
    class Tied(nn.Module):
        """Words in, words out, with one table."""

        def __init__(self) -> None:
            super().__init__()
            self.patch, self.wide, self.back = nn.Linear(12, 16), nn.Linear(16, 24), nn.Linear(24, 16)
            self.out, self.table = nn.Linear(16, 10, bias=False), nn.Embedding(10, 16)
            self.out.weight = self.table.weight

        def forward(self, x: Tensor) -> Tensor:
            words = self.patch(x) + self.table(x.abs().sum(-1).long() % 10)
            return self.out(words + self.back(F.relu(self.wide(words)))).mean(1)

    model, tokens = ready(Tied()), torch.rand(2, 5, 12)
    groups = find_groups(model, tokens)
    assert "wide" in groups.names
    cut: Any = thin(model, groups, random_structure(groups, 0))
    assert cut.out.weight is cut.table.weight
    assert masked_against_thin(model, groups, random_structure(groups, 0), tokens) <= 1e-4


def test_parametrised_weights_stay() -> None:
    model = ready(MadeUp())
    torch.nn.utils.parametrizations.weight_norm(model.get_submodule("mix"))
    groups = find_groups(model, torch.rand(1, 3, 48, 40))
    assert "mix" not in groups.names
    assert groups.frozen["mix"].startswith("its weight is computed")
    fed = {name for name, why in groups.frozen.items() if why.startswith("its channels meet mix: its weight is")}
    assert fed
    assert "mix" not in fed
    assert "grouped.0" in groups.names
    assert masked_against_thin(model, groups, random_structure(groups, 0), torch.rand(IMAGES)) <= 1e-4


class Short(nn.Module):
    """A residual block whose last layer has a weight of another kind."""

    def __init__(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(8, 8, 3, padding=1), wrap(nn.Conv2d(8, 8, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(self.first(x).relu())


def _with_weight_of(other: nn.Module) -> Callable[[nn.Module], nn.Module]:
    def share(module: nn.Module) -> nn.Module:
        module.weight = other.weight
        return module

    return share


@pytest.mark.parametrize(
    "wrap",
    [
        torch.nn.utils.parametrizations.weight_norm,
        torch.nn.utils.parametrizations.spectral_norm,
        _with_weight_of(nn.Conv2d(8, 8, 3)),
    ],
)
def test_blocks_that_end_in_such_weights_stay(wrap: Callable[[nn.Module], nn.Module]) -> None:
    one, two = Short(wrap), Short(wrap)
    behind = (nn.Conv2d(8, 8, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), one, two, *behind).eval()
    images = torch.rand(2, 3, 12, 10)
    groups = find_groups(model, images[:1])
    assert groups.names == ("4",)
    assert {"depth:2", "depth:3"} <= set(groups.frozen)
    assert not any("KeyError" in why for why in groups.frozen.values())
    assert masked_against_thin(model, groups, random_structure(groups, 0), images) <= 1e-4


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.LazyLinear(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).flatten(1))


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: torch.jit.trace(ready(MadeUp()), torch.rand(1, 3, 48, 40)), "TorchScript"),
        (Lazy, "lazy layers"),
    ],
)
def test_what_can_not_be_cut_is_refused_in_one_line(made: Any, said: str) -> None:
    with pytest.raises(BadInput, match=said) as caught:
        find_groups(made(), torch.rand(1, 3, 48, 40))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("hooked", "said"),
    [
        (torch.nn.utils.weight_norm, "WeightNorm"),
        (torch.nn.utils.spectral_norm, "SpectralNorm"),
        (lambda module: prune.l1_unstructured(module, "weight", 0.5), "L1Unstructured"),
    ],
)
def test_weights_that_a_hook_computes_are_named(hooked: Callable[[nn.Module], nn.Module], said: str) -> None:
    """A copy of such a network can't be made once it has run; parametrisations have no such trouble."""
    model = scripted.tiny_resnet()
    hooked(model.get_submodule("layer1.0.conv1"))
    model(torch.rand(2, 3, *scripted.SIZE))
    config = make_config({"model": "<own>", "data": "stripes"})
    with pytest.raises(BadInput, match=rf"layer1\.0\.conv1 has a weight that a hook computes \({said}\), .*remove"):
        load_subject(config, model=model, data=scripted.data())


class Keeps(nn.Module):
    """Keeps its features for a loss of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3))
        self.features: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.features = self.inner(x)
        return self.features * 1


def test_a_network_that_holds_what_it_computed_is_named() -> None:
    network, images = Keeps(), torch.rand(2, 3, 12, 12)
    network(images)
    with pytest.raises(BadInput, match=r"can't be copied \(.*\); features holds what .* torch.no_grad\(\) first"):
        find_groups(network, images)
    with torch.no_grad():
        network(images)
    assert find_groups(network, images).groups
