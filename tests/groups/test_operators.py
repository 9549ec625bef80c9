from __future__ import annotations

import numpy as np
import torch
from torch import nn

from passdeploy.groups import find_groups, macs, operators, params, units_of
from passdeploy.groups.check import random_structure
from passdeploy.models import build
from passdeploy.surgery import thin
from tests.groups.nets import MadeUp, ready


def _counted(model: nn.Module, images: torch.Tensor) -> tuple[float, float]:
    """MACs and parameters of the layers, counted from shapes as they run."""
    macs_, weights = [], {}

    def hook(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        pixels = inputs[0] if isinstance(layer, nn.ConvTranspose2d) else output
        macs_.append(layer.weight.numel() * pixels[0].numel() / pixels.shape[1])
        weights[layer] = sum(p.numel() for p in layer.parameters())

    handles = [
        m.register_forward_hook(hook) for m in model.modules() if isinstance(m, (nn.modules.conv._ConvNd, nn.Linear))
    ]
    model(images)
    for handle in handles:
        handle.remove()
    return sum(macs_), sum(weights.values())


def test_resnet20_dense() -> None:
    model, images = build("resnet20", 10).eval(), torch.rand(1, 3, 32, 32)
    groups = find_groups(model, images)
    ops = operators(model, images, groups)
    assert len(ops) == 22
    assert macs(ops) == 40_813_184
    assert params(ops) == _counted(model, images)[1]
    second = next(op for op in ops if op.name == "layer2.1.conv2")
    assert (second.kind, second.kernel, second.stride, second.in_hw, second.out_hw) == (
        "conv",
        (3, 3),
        (1, 1),
        (16, 16),
        (16, 16),
    )
    names = groups.names
    assert [names[g] for g, _ in second.in_units] == ["layer2.1.conv1"]
    assert [names[g] for g, _ in second.out_units] == ["layer2.0.downsample.0"]
    assert [names[g] for g in second.gates] == ["depth:layer2.1"]


class _ByName(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(input=self.conv(input=x).relu().mean((2, 3)))


def test_layers_may_be_called_by_name() -> None:
    model, images = _ByName().eval(), torch.rand(1, 3, 8, 8)
    ops = operators(model, images, find_groups(model, images))
    assert [(op.name, op.in_hw) for op in ops] == [("conv", (8, 8)), ("fc", (1, 1))]
    assert macs(ops) == _counted(model, images)[0]


def test_counts_follow_the_kept_units() -> None:
    model, images = ready(MadeUp()), torch.rand(1, 3, 48, 40)
    groups = find_groups(model, images)
    ops = operators(model, images, groups)
    structures = [random_structure(groups, seed) for seed in range(6)]
    widths = np.array([[structure.widths()[name] for name in groups.names] for structure in structures])
    counted = [_counted(thin(model, groups, structure), images) for structure in structures]
    assert np.allclose(macs(ops, widths), [c[0] for c in counted])
    assert np.allclose(params(ops, widths), [c[1] for c in counted])
    assert macs(ops, widths[2]) == counted[2][0]


def test_dense_widths_are_the_dense_network() -> None:
    model, images = ready(MadeUp()), torch.rand(1, 3, 48, 40)
    groups = find_groups(model, images)
    ops = operators(model, images, groups)
    assert macs(ops, units_of(groups)) == macs(ops) == _counted(model, images)[0]
    kinds = {op.name: op.kind for op in ops}
    assert (kinds["depthwise"], kinds["grouped.1"], kinds["fc2"]) == ("depthwise", "conv", "linear")


def test_a_layer_that_runs_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.body, self.fc = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.body(self.body(self.stem(x))).mean((2, 3)))

    model, images = ready(Twice()), torch.rand(1, 3, 8, 8)
    groups = find_groups(model, images)
    ops = operators(model, images, groups)
    assert [op.name for op in ops] == ["stem", "body", "body", "fc"]
    assert (macs(ops), params(ops)) == _counted(model, images)
    assert groups.units == {"stem": 4}
