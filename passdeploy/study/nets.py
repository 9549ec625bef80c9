"""Small networks of other kinds than ResNets, for the studies: densely connected, a U, a transformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _conv(cin: int, cout: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(cin, cout, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(cout), nn.ReLU())


class DenseNet(nn.Module):
    """Three stages whose layers see all earlier ones (Huang et al., arXiv 1608.06993), `layers` each."""

    def __init__(self, num_classes: int = 10, layers: int = 4, growth: int = 16) -> None:
        super().__init__()
        width = 2 * growth
        self.stem = _conv(3, width)
        self.stages, self.transitions = nn.ModuleList(), nn.ModuleList()
        for stage in range(3):
            self.stages.append(nn.ModuleList(_conv(width + i * growth, growth) for i in range(layers)))
            width += layers * growth
            if stage < 2:
                self.transitions.append(_conv(width, width // 2, 1))
                width //= 2
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, 3, H, W) to logits."""
        x = self.stem(x)
        for index, stage in enumerate(self.stages):
            assert isinstance(stage, nn.ModuleList)
            for layer in stage:
                x = torch.cat([x, layer(x)], 1)
            if index < len(self.transitions):
                x = F.avg_pool2d(self.transitions[index](x), 2)
        return self.fc(x.mean((2, 3)))


class UNet(nn.Module):
    """Down and up again with concatenated skips (Ronneberger et al., arXiv 1505.04597), then a classifier."""

    def __init__(self, num_classes: int = 10, width: int = 16) -> None:
        super().__init__()
        self.down1, self.down2 = _conv(3, width), _conv(width, 2 * width, stride=2)
        self.bottom = _conv(2 * width, 4 * width, stride=2)
        self.up2, self.up1 = _conv(6 * width, 2 * width), _conv(3 * width, width)
        self.out = _conv(width, 4 * width, stride=2)
        self.fc = nn.Linear(4 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, 3, H, W), H and W multiples of 4, to logits."""
        first = self.down1(x)
        second = self.down2(first)
        up = self.up2(torch.cat([F.interpolate(self.bottom(second), scale_factor=2.0), second], 1))
        up = self.up1(torch.cat([F.interpolate(up, scale_factor=2.0), first], 1))
        return self.fc(self.out(up).mean((2, 3)))


def small_densenet(num_classes: int = 10) -> nn.Module:
    """Twelve densely connected layers."""
    return DenseNet(num_classes)


def small_unet(num_classes: int = 10) -> nn.Module:
    """Two levels."""
    return UNet(num_classes)


def small_vit(num_classes: int = 10) -> nn.Module:
    """Torchvision's vision transformer for 32x32 images: 6 blocks of 4 heads, width 96, patches of 4."""
    from passdeploy._torchvision import torchvision

    vit: nn.Module = torchvision().models.VisionTransformer(
        image_size=32, patch_size=4, num_layers=6, num_heads=4, hidden_dim=96, mlp_dim=192, num_classes=num_classes
    )
    return vit
