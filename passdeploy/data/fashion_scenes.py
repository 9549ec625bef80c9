"""Scenes of Fashion-MNIST images with a class per pixel: the built-in segmentation data set.

Each scene is 48x48 and grey: one to three articles from Fashion-MNIST (real images; training scenes from its training
images, test scenes from its test images), each at half to full size, at random places on a background of a random
slope and noise; later ones cover earlier ones. A pixel belongs to an article where the article's own image is brighter
than a tenth of the range; everything else is background. So masks are exact, and known.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from passdeploy.data import register
from passdeploy.data.base import ArraySplit, Augmentation, ImageData, Preprocess
from passdeploy.data.fashion_mnist import CLASSES, articles

SIDE = 48
COUNTS = {"train": 8000, "val": 1000, "test": 2000}
DARK = 26
"""Brightness (of 255) up to which a pixel of an article counts as background."""


def _background(rng: np.random.Generator) -> np.ndarray:
    slope = np.add.outer(
        np.linspace(-1, 1, SIDE) * rng.uniform(-30, 30), np.linspace(-1, 1, SIDE) * rng.uniform(-30, 30)
    )
    return rng.uniform(20, 120) + slope + rng.normal(0, 8, (SIDE, SIDE))


def scenes(images: np.ndarray, labels: np.ndarray, count: int, seed: int) -> ArraySplit:
    """Composes scenes.

    Args:
        images: uint8 (n, 28, 28).
        labels: (n,), 0 .. 9.
        count: Scenes.
        seed: Same seed, same scenes.

    Returns:
        uint8 images (count, 1, 48, 48) and uint8 labels (count, 48, 48): 0 is the background, k + 1 is class k.
    """
    rng = np.random.default_rng(seed)
    sizes = (14, 20, 28)
    scaled = {
        size: F.interpolate(torch.from_numpy(images)[:, None].float(), (size, size), mode="area")[:, 0].numpy()
        for size in sizes
    }
    pixels = np.empty((count, 1, SIDE, SIDE), np.uint8)
    masks = np.zeros((count, SIDE, SIDE), np.uint8)
    for i in range(count):
        canvas = _background(rng)
        for _ in range(rng.integers(1, 4)):
            which, size = int(rng.integers(len(images))), int(rng.choice(sizes))
            top, left = rng.integers(0, SIDE - size + 1, 2)
            article = scaled[size][which]
            inside = article > DARK
            place = (slice(top, top + size), slice(left, left + size))
            canvas[place] = np.where(inside, article, canvas[place])
            masks[i][place] = np.where(inside, labels[which] + 1, masks[i][place])
        pixels[i, 0] = np.clip(canvas, 0, 255)
    return ArraySplit(torch.from_numpy(pixels), torch.from_numpy(masks))


@register("fashion-scenes")
def fashion_scenes() -> ImageData:
    """8,000 training, 1,000 validation and 2,000 test scenes with eleven classes of pixels."""
    (train_x, train_y), (test_x, test_y) = articles()
    held = len(train_x) - 5000  # validation scenes are made of articles that no training scene has
    return ImageData(
        name="fashion-scenes",
        classes=("background", *CLASSES),
        preprocess=Preprocess(size=(SIDE, SIDE), mean=(0.35,) * 3, std=(0.25,) * 3),
        augmentation=Augmentation(flip=True, shift=3),
        train=scenes(train_x[:held], train_y[:held], COUNTS["train"], 0),
        val=scenes(train_x[held:], train_y[held:], COUNTS["val"], 1),
        test=scenes(test_x, test_y, COUNTS["test"], 2),
        licence="MIT",
        task="segmentation",
    )
