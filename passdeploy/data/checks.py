"""What a data set of the user's has to keep to, checked before anything is trained on it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from passdeploy.data.base import ArraySplit, ImageData, ResizedSplit, Split, SubSplit, evenly, label_tensor
from passdeploy.errors import BadInput
from passdeploy.plugins import users_code

if TYPE_CHECKING:
    from passdeploy.tasks import Task

ROUNDING = 1e-3
"""How far outside [0, 1] a resized image may lie."""
WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
"""Types that labels may have; PyTorch hardly computes with its other unsigned ones."""


def check_data(data: ImageData, task: Task) -> None:
    """Refuses splits whose images are not what is declared, or whose labels do not fit them or the class names.

    Args:
        data: The user's.
        task: Which the data are for.

    Raises:
        BadInput: One line: which split, what is wrong.
    """
    _check_normalisation(data)
    _check_words(data)
    if data.num_classes < 2 and _cross_entropy(task):
        raise BadInput(f"--data {data.name}: {data.num_classes} class(es); two or more are needed to tell apart")
    for name in ("train", "val", "test"):
        split: Split = getattr(data, name)
        labels, where = label_tensor(data, name), f"--data {data.name}: {name}"
        _check_pixels(split, where)
        if labels.dtype not in WHOLE:
            raise BadInput(
                f"{where}: labels are {labels.dtype}, must be whole numbers in int64; convert them with .long()"
            )
        if labels.dtype == torch.uint8 and labels.ndim == 1:  # in which the label that counts nowhere does not exist
            raise BadInput(f"{where}: labels are torch.uint8, must be int64; convert them with .long()")
        images = len(split.pixels) if isinstance(split, ArraySplit) else len(split)
        if images != len(labels):
            raise BadInput(f"{where}: {images} images but {len(labels)} labels; give one label an image")
        if not images and name != "test":
            raise BadInput(f"{where}: holds no images; give some")
        counted = labels[labels != task.ignore]
        low, high = (int(counted.min()), int(counted.max())) if len(counted) else (0, 0)
        if low < 0 or high >= data.num_classes:
            raise BadInput(
                f"{where}: labels go from {low} to {high}, {data.num_classes} classes have 0 to "
                f"{data.num_classes - 1}; number them from 0, in the order of the class names"
            )
        if images:
            _check_places(labels, data, task, where)
            _check_images(split, data, where)


def _check_normalisation(data: ImageData) -> None:
    """Refuses a normalisation that is not for RGB images in [0, 1]."""
    mean, std = data.preprocess.mean, data.preprocess.std
    if len(mean) != 3 or len(std) != 3 or not all(0 <= m <= 1 for m in mean) or not all(0 < s <= 1 for s in std):
        raise BadInput(
            f"--data {data.name}: mean {tuple(mean)} and std {tuple(std)} are not for RGB images in [0, 1]: three "
            "means in [0, 1], three deviations above 0 and up to 1; divide both by 255 if they are for values up to 255"
        )


def _check_words(data: ImageData) -> None:
    """Refuses names that are no text, which no bundle could carry in the end."""
    other = next((name for name in data.classes if not isinstance(name, str)), None)
    if other is not None:
        raise BadInput(f"--data {data.name}: class {other!r} is no text; name classes by strings: tuple(map(str, ...))")
    if not isinstance(data.licence, str):
        raise BadInput(f'--data {data.name}: licence is {data.licence!r}; give a string, such as "unknown"')


def _cross_entropy(task: Task) -> bool:
    """Whether the loss is the default: one of a user's task may mean something else by classes and labels."""
    from passdeploy.tasks.base import Task as Base

    return type(task).loss is Base.loss


def _check_places(labels: Tensor, data: ImageData, task: Task, where: str) -> None:
    """Refuses labels that are not one per place of an output; a loss of one's own may take others, alike in all splits.

    They would be compared with outputs all the same, each with each.
    """
    by_place = labels.ndim == 3 or _cross_entropy(task)
    wanted = task.output_shape(data)[1:] if by_place else tuple(data.train.labels.shape[1:])
    if labels.shape[1:] != wanted:
        advice = "maps the size of the images, resized to the nearest label" if wanted else "one label an image"
        raise BadInput(f"{where}: labels are {tuple(labels.shape)}, must be {(len(labels), *wanted)}; give {advice}")


def _check_pixels(split: Split, where: str) -> None:
    """Refuses images in memory that are not 8-bit: they would be divided by 255 whatever they are."""
    while isinstance(split, SubSplit | ResizedSplit):
        split = split.parent
    pixels: object = split.pixels if isinstance(split, ArraySplit) else None
    kind = pixels.dtype if isinstance(pixels, Tensor) else type(pixels).__name__
    if isinstance(split, ArraySplit) and kind != torch.uint8:
        raise BadInput(f"{where}: pixels are {kind}, must be torch.uint8 from 0 to 255; convert them")


def _check_images(split: Split, data: ImageData, where: str) -> None:
    """Refuses images of another type, number, size or range than the network is going to be given."""
    asked = min(8, len(split))
    with users_code(f"{where}: asking for images"):
        images: object = split.images(evenly(split, asked))
    if not isinstance(images, Tensor) or images.dtype != torch.float32 or images.device.type != "cpu":
        kind = (
            f"{images.dtype} on {images.device}" if isinstance(images, Tensor) else f"of type {type(images).__name__}"
        )
        raise BadInput(f"{where}: images are {kind}, must be a tensor of torch.float32 on the CPU; convert them")
    if len(images) != asked:
        raise BadInput(f"{where}: {len(images)} images for {asked} indices; return one for each, in their order")
    if tuple(images.shape[1:]) != data.input_shape:
        raise BadInput(
            f"{where}: images are {tuple(images.shape[1:])}, declared are {data.input_shape}; set Preprocess.size, or "
            "resize them"
        )
    low, high = float(images.min()), float(images.max())
    if not (low >= -ROUNDING and high <= 1 + ROUNDING):  # true of NaN as well
        raise BadInput(
            f"{where}: images go from {low:.3g} to {high:.3g}, must lie in [0, 1]; divide 8-bit values by 255, and "
            "leave normalisation to Preprocess.mean and std"
        )
    with users_code(f"{where}: asking for images"):
        again = split.images(evenly(split, asked))
    if not torch.equal(images, again):
        raise BadInput(
            f"{where}: the same indices give other images each time, so that nothing can be resumed or compared; leave "
            "what changes them at random to ImageData.augmentation, or to augment of a task of your own"
        )
