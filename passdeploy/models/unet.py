"""UNet (Ronneberger et al., arXiv 1505.04597) with batch norm: encoder, decoder, concatenated skips."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from passdeploy.models import register


class DoubleConv(nn.Sequential):
    """Two 3x3 convolutions, each with batch norm and ReLU."""

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__(
            nn.Conv2d(cin, cout, 3, padding=1, bias=False),
            nn.BatchNorm2d(cout),
            nn.ReLU(inplace=True),
            nn.Conv2d(cout, cout, 3, padding=1, bias=False),
            nn.BatchNorm2d(cout),
            nn.ReLU(inplace=True),
        )


class Up(nn.Module):
    """Doubles the size, concatenates the encoder's features of that size, and convolves twice."""

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(cin, cout, 2, stride=2)
        self.conv = DoubleConv(2 * cout, cout)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Maps (N, cin, H, W) and (N, cout, 2H, 2W) to (N, cout, 2H, 2W)."""
        return self.conv(torch.cat([skip, self.up(x)], 1))


class UNet(nn.Module):
    """Images whose sides `2 ** (depth - 1)` divides -> logits per pixel.

    Args:
        num_classes: Of a pixel.
        width: Channels of the first level; each level has twice those of the one before.
        depth: Levels.
    """

    def __init__(self, num_classes: int = 21, width: int = 32, depth: int = 5) -> None:
        super().__init__()
        widths = [width * 2**i for i in range(depth)]
        self.stem = DoubleConv(3, widths[0])
        self.pool = nn.MaxPool2d(2)
        self.down = nn.ModuleList(DoubleConv(a, b) for a, b in pairwise(widths))
        self.up = nn.ModuleList(Up(b, a) for a, b in reversed(list(pairwise(widths))))
        self.head = nn.Conv2d(width, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps normalised images (N, 3, H, W) to logits (N, num_classes, H, W)."""
        x = self.stem(x)
        skips = []
        for level in self.down:
            skips.append(x)
            x = level(self.pool(x))
        for level, skip in zip(self.up, reversed(skips), strict=True):
            x = level(x, skip)
        return self.head(x)


@register("unet")
def unet(num_classes: int = 21) -> nn.Module:
    """UNet of five levels from 32 to 512 channels, 7.8 M parameters."""
    return UNet(num_classes)


@register("unet_small")
def unet_small(num_classes: int = 21) -> nn.Module:
    """UNet of three levels from 16 to 64 channels, 0.12 M parameters: trains on a CPU."""
    return UNet(num_classes, width=16, depth=3)
