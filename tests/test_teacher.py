"""The teacher computes what the network it was made of computes, folded or not."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from passdeploy.models import build
from passdeploy.surgery import relative_difference
from passdeploy.teacher import Teacher

CPU = torch.device("cpu")
SHAPE = (3, 16, 16)
IMAGES = torch.rand(5, *SHAPE, generator=torch.Generator().manual_seed(1))


def randomised(model: nn.Module) -> nn.Module:
    """Batch norms that do something."""
    generator = torch.Generator().manual_seed(2)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for tensor in (norm.weight.data, norm.running_var, norm.bias.data, norm.running_mean):
                assert tensor is not None
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return model


class ByValue(nn.Module):
    """Branches on its input: cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, images: Tensor) -> Tensor:
        features = self.norm(self.conv(images))
        return (features if features.mean() > 0 else -features).mean((2, 3))


class WithHook(nn.Module):
    """Its trace would miss what the hook does to the norm's output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.norm.register_forward_hook(lambda module, inputs, output: output * 2)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.norm(self.conv(images))
        return features.mean((2, 3))


def norms(model: nn.Module) -> int:
    return sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())


def test_folds_every_batch_norm_and_computes_the_same() -> None:
    model = randomised(build("resnet20", 10)).train()
    before = copy.deepcopy(model.state_dict())
    teacher = Teacher(model, CPU, SHAPE)
    assert norms(teacher._run) == 0
    assert relative_difference(copy.deepcopy(model).eval()(IMAGES), teacher(IMAGES)) < 1e-5
    assert model.training and all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters()) and not teacher(IMAGES).requires_grad


def test_what_cannot_be_traced_runs_as_it_is() -> None:
    for network in (ByValue(), WithHook()):
        model = randomised(network).eval()
        teacher = Teacher(model, CPU, SHAPE)
        assert norms(teacher._run) == 1
        assert relative_difference(model(IMAGES), teacher(IMAGES)) < 1e-6


def test_images_reach_it_as_its_own_layers_need_them() -> None:
    """A thin network may train channels last where the dense one, a layer of which is gone from it, can't."""

    class Regrouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, padding=1)

        def forward(self, images: Tensor) -> Tensor:
            features = self.conv(images)
            parts = features.view(len(images) * 2, 4, *features.shape[2:])
            return parts.amax((2, 3)).reshape(len(images), 8)

    model = Regrouped().eval()
    teacher = Teacher(model, CPU, SHAPE)
    turned = IMAGES.contiguous(memory_format=torch.channels_last)
    assert relative_difference(model(IMAGES), teacher(turned)) < 1e-6
