"""Generated pictures of the size that the networks take: for runs whose latencies are asked about, not accuracies.

Ten classes of striped pictures that differ in direction and colour. A network learns them in a few hundred steps, so
that a search has a loss to follow; what accuracy it reaches says nothing about real images.
"""

from __future__ import annotations

import math

import torch

from passdeploy.data.base import ArraySplit, Augmentation, ImageData, Preprocess

SIDE, CLASSES = 224, 10


def _split(count: int, seed: int) -> ArraySplit:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    axis = torch.arange(SIDE, dtype=torch.float32)
    pixels = torch.empty(count, 3, SIDE, SIDE, dtype=torch.uint8)
    for index, label in enumerate(labels.tolist()):
        angle = math.pi * label / CLASSES
        phase, period = 6.28 * torch.rand(2, generator=generator).tolist()[0], 12 + 2 * (label % 3)
        wave = torch.sin((axis[:, None] * math.sin(angle) + axis * math.cos(angle)) * 6.28 / period + phase)
        colour = torch.rand(3, 1, 1, generator=generator) * 0.5 + 0.25
        noise = torch.rand(3, SIDE, SIDE, generator=generator)
        pixels[index] = ((colour + 0.15 * wave + 0.2 * noise).clamp(0, 1) * 255).to(torch.uint8)
    return ArraySplit(pixels, labels)


def load() -> ImageData:
    """2,560 pictures to train on, 256 to validate, 256 to test."""
    return ImageData(
        name="generated stripes",
        classes=tuple(f"direction {index}" for index in range(CLASSES)),
        preprocess=Preprocess(size=(SIDE, SIDE), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)),
        augmentation=Augmentation(flip=False),
        train=_split(2560, 0),
        val=_split(256, 1),
        test=_split(256, 2),
        licence="none needed",
    )
