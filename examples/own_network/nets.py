"""A small network of one's own: a residual add, a concatenation followed by batch norm, squeeze-and-excite."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def conv(cin: int, cout: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution, batch norm, ReLU."""
    return nn.Sequential(nn.Conv2d(cin, cout, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(cout), nn.ReLU())


class Residual(nn.Module):
    """Two convolutions, added to their input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv(width, width), nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.body(x))


class Fork(nn.Module):
    """Two branches whose channels are concatenated and then normalised together."""

    def __init__(self, cin: int, narrow: int, wide: int) -> None:
        super().__init__()
        self.narrow = conv(cin, narrow, kernel=1)
        self.wide = conv(cin, wide)
        self.norm = nn.BatchNorm2d(narrow + wide)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(torch.cat([self.narrow(x), self.wide(x)], 1)))


class SqueezeExcite(nn.Module):
    """Scales each channel by a factor computed from all channels' means."""

    def __init__(self, width: int, squeezed: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(width, squeezed, 1)
        self.excite = nn.Conv2d(squeezed, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.relu(self.squeeze(x.mean((2, 3), keepdim=True)))
        return x * torch.sigmoid(self.excite(scale))


class OwnNet(nn.Module):
    """Maps normalised images (N, 3, 48, 40), or any other size, to logits (N, num_classes)."""

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.stem = conv(3, 24, stride=2)
        self.block1 = Residual(24)
        self.block2 = Residual(24)
        self.fork = Fork(24, 16, 32)
        self.attention = SqueezeExcite(48, 16)
        self.down = conv(48, 48, stride=2)
        self.block3 = Residual(48)
        self.head = nn.Linear(48, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block2(self.block1(self.stem(x)))
        x = self.block3(self.down(self.attention(self.fork(x))))
        return self.head(x.mean((2, 3)))


def build(num_classes: int = 3) -> nn.Module:
    """What ``--model nets:build`` calls."""
    return OwnNet(num_classes)
