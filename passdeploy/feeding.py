"""What training is fed with: which images make up a step, and how they are changed at random."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import numpy as np
import torch
from torch import Tensor

from passdeploy.data.ahead import ahead, pinned, worthwhile
from passdeploy.data.base import Augmentation, ImageData, Split
from passdeploy.tasks import Task, task_of


def augment(images: Tensor, how: Augmentation, generator: torch.Generator) -> Tensor:
    """Flips and shifts each image of (N, C, H, W) on its own.

    One image at a time, by slices: several times as fast as by indices of all the pixels of a batch.
    """
    if not how.shift and not how.flip:
        return images
    count = len(images)
    down = across = mirrored = [0] * count
    if how.shift:
        down, across = (torch.randint(0, 2 * how.shift + 1, (2, count), generator=generator) - how.shift).tolist()
    if how.flip:
        mirrored = (torch.rand(count, generator=generator) < 0.5).tolist()
    changed = torch.empty_like(images, memory_format=torch.channels_last)
    for to, image, y, x, mirror in zip(changed.numpy(), images.numpy(), down, across, mirrored, strict=True):
        _shift(to[:, :, ::-1] if mirror else to, image, y, x)
    return changed


def _shift(to: np.ndarray, image: np.ndarray, y: int, x: int) -> None:
    """Writes into `to` the part of an image (C, H, W) that begins at (y, x); outside it, its edges are repeated."""
    _, height, width = image.shape
    y, x = max(1 - height, min(height - 1, y)), max(1 - width, min(width - 1, x))  # beyond it, there are edges only
    top, bottom, left, right = max(0, -y), height - max(0, y), max(0, -x), width - max(0, x)
    to[:, top:bottom, left:right] = image[:, top + y : bottom + y, left + x : right + x]
    to[:, top:bottom, :left] = to[:, top:bottom, left : left + 1]
    to[:, top:bottom, right:] = to[:, top:bottom, right - 1 : right]
    to[:, :top] = to[:, top : top + 1]
    to[:, bottom:] = to[:, bottom - 1 : bottom]


def steps_per_epoch(split: Split, batch: int) -> int:
    """Whole batches in one pass; at least one."""
    return max(1, len(split) // batch)


def training_batches(
    data: ImageData, batch: int, seed: int, total: int, start: int = 0
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yields (step, augmented images, labels) for steps `start` .. `total` - 1; epochs are reshuffled.

    They are the same whether they are made ahead, which they are where that is worthwhile, or when they are asked for.
    """
    task, chosen = task_of(data), _chosen(data.train, batch, seed, total, start)

    def changed(step: int, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed((seed * 1_000_003 + step) * 2 + 1)
        return task.augment(images, labels, data.augmentation, generator)

    def begin(step: int) -> None:  # what layers draw (dropout) is a function of the step, too
        torch.manual_seed((seed * 1_000_003 + step) * 2)

    if not worthwhile(data.train, batch):
        for step, indices in chosen:
            begin(step)
            yield step, *changed(step, data.train.images(indices), data.train.labels[indices])
        return

    ours = type(task).augment is Task.augment  # others may draw from what is seeded for the step

    def make(one: tuple[int, Tensor]) -> tuple[int, Tensor, Tensor]:
        step, indices = one
        images, labels = data.train.images(indices), data.train.labels[indices]
        if ours:
            images, labels = changed(step, images, labels)
        return step, pinned(images), pinned(labels)

    with closing(ahead(make, chosen)) as made:
        for step, images, labels in made:
            begin(step)
            yield step, *((images, labels) if ours else changed(step, images, labels))


def _chosen(split: Split, batch: int, seed: int, total: int, start: int) -> Iterator[tuple[int, Tensor]]:
    """Yields (step, indices of its images)."""
    per_epoch, batch = steps_per_epoch(split, batch), min(batch, len(split))
    order, shuffled = torch.empty(0), -1
    for step in range(start, total):
        epoch, within = divmod(step, per_epoch)
        if epoch != shuffled:
            order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
            shuffled = epoch
        yield step, order[within * batch : (within + 1) * batch]
