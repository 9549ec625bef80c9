"""ResNets for small images (He et al., arXiv 1512.03385, section 4.2); projection shortcuts where shapes change."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from passdeploy.models import register


def _conv_bn(cin: int, cout: int, kernel: int, stride: int) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    return nn.Conv2d(cin, cout, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(cout)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv_bn(cin, cout, 3, stride)
        self.conv2, self.bn2 = _conv_bn(cout, cout, 3, 1)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or cin != cout:
            self.downsample = nn.Sequential(*_conv_bn(cin, cout, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, cin, H, W) to (N, cout, H / stride, W / stride)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + shortcut)


class CifarResNet(nn.Module):
    """Three stages of basic blocks at full, half and quarter resolution.

    Args:
        blocks: Residual blocks per stage.
        num_classes: Outputs of the classifier.
        widths: Channels per stage.
    """

    def __init__(
        self, blocks: tuple[int, int, int], num_classes: int = 10, widths: tuple[int, int, int] = (16, 32, 64)
    ) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv_bn(3, widths[0], 3, 1)
        self.relu = nn.ReLU(inplace=True)
        cin = widths[0]
        stages = []
        for stage, (depth, width) in enumerate(zip(blocks, widths, strict=True)):
            layers = []
            for index in range(depth):
                layers.append(BasicBlock(cin, width, 2 if stage > 0 and index == 0 else 1))
                cin = width
            stages.append(nn.Sequential(*layers))
        self.layer1, self.layer2, self.layer3 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(cin, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Maps normalised images (N, 3, H, W) to logits (N, num_classes)."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))


@register("resnet20")
def resnet20(num_classes: int = 10) -> nn.Module:
    """ResNet-20: three stages of three blocks, 0.27 M parameters."""
    return CifarResNet((3, 3, 3), num_classes)


@register("resnet32")
def resnet32(num_classes: int = 10) -> nn.Module:
    """ResNet-32: three stages of five blocks, 0.46 M parameters."""
    return CifarResNet((5, 5, 5), num_classes)


@register("resnet56")
def resnet56(num_classes: int = 10) -> nn.Module:
    """ResNet-56: three stages of nine blocks, 0.85 M parameters."""
    return CifarResNet((9, 9, 9), num_classes)
