"""What the rest of the program needs to know about a data set."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from passdeploy.errors import BadInput
from passdeploy.plugins import users_code

if TYPE_CHECKING:
    from passdeploy.tasks import Task

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

ROUNDING = 1e-3
"""How far outside [0, 1] a resized image may lie."""
WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
"""Types that labels may have; PyTorch hardly computes with its other unsigned ones."""


class Split(Protocol):
    """One part of a data set; images are decoded when they are asked for.

    One with an attribute `threads` that is true is asked from several threads at once, before they are needed.
    """

    labels: Tensor

    def __len__(self) -> int: ...

    def images(self, indices: Tensor) -> Tensor:
        """Returns float32 RGB images (len(indices), 3, H, W) in [0, 1]."""
        ...


@dataclass
class ArraySplit:
    """Images held in memory.

    Args:
        pixels: uint8 (N, C, H, W); C is 1 (grey, shown as RGB) or 3.
        labels: int64 (N,), or uint8 (N, H, W) for a class per pixel.
    """

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, indices: Tensor) -> Tensor:
        chosen = self.pixels[indices].float().div_(255)
        return chosen.expand(-1, 3, -1, -1).contiguous() if chosen.shape[1] == 1 else chosen


@dataclass
class SubSplit:
    """Some images of another split."""

    parent: Split
    indices: Tensor
    labels: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.labels = self.parent.labels[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def images(self, indices: Tensor) -> Tensor:
        return self.parent.images(self.indices[indices])


@dataclass
class ResizedSplit:
    """Another split's images at another size: bilinear, antialiased and rounded to 8 bits, as a resized file would be.

    Args:
        parent: Images of any size.
        size: (H, W), pixels.
    """

    parent: Split
    size: tuple[int, int]
    labels: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.labels = self.parent.labels
        if self.labels.ndim == 3:  # a class per pixel: nothing lies between two classes
            self.labels = functional.interpolate(self.labels[:, None].float(), self.size, mode="nearest-exact")[
                :, 0
            ].to(self.labels.dtype)

    def __len__(self) -> int:
        return len(self.parent)

    def images(self, indices: Tensor) -> Tensor:
        resized = functional.interpolate(self.parent.images(indices), self.size, mode="bilinear", antialias=True)
        return resized.mul_(255).round_().clamp_(0, 255).div_(255)


@dataclass(frozen=True)
class Preprocess:
    """How a file becomes the network's input: recorded in the bundle, so that a server does the same.

    Attributes:
        size: (H, W) of the network's input, pixels.
        resize: Shorter side is resized to this before the centre crop; None: resized to `size` at once.
        mean: Per channel, on [0, 1] RGB; inside the shipped graph.
        std: Per channel, on [0, 1] RGB; inside the shipped graph.
    """

    size: tuple[int, int]
    resize: int | None = None
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD


@dataclass(frozen=True)
class Augmentation:
    """Random changes of a training image: horizontal flips, and shifts by up to `shift` pixels (edges repeated)."""

    flip: bool = True
    shift: int = 0


@dataclass
class ImageData:
    """A data set with its three splits.

    `val` is always cut from the training data; whatever is chosen is chosen on it. `test` is only ever reported. `task`
    is the name of a task (`passdeploy.tasks`); None: the labels say (one per image, or one per pixel). `files` is a
    digest of what is known of all image files, where there are some.
    """

    name: str
    classes: tuple[str, ...]
    preprocess: Preprocess
    augmentation: Augmentation
    train: Split
    val: Split
    test: Split
    licence: str = "unknown"
    task: str | None = None
    files: str = ""

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(3, H, W)."""
        return (3, *self.preprocess.size)

    def digest(self) -> str:
        """SHA-256 over what is declared, labels, files and a sample of the pixels: tells one data set from another."""
        declared = (self.name, self.classes, self.preprocess, self.augmentation, self.task)
        h = hashlib.sha256(f"{declared!r}{self.files}".encode())
        for split in (self.train, self.val, self.test):
            h.update(split.labels.numpy().tobytes())
            some = torch.linspace(0, len(split) - 1, min(16, len(split))).long()
            h.update(np.round(split.images(some).numpy() * 255).astype(np.uint8).tobytes())
        return h.hexdigest()


def resized(data: ImageData, size: tuple[int, int]) -> ImageData:
    """The data set at another input size (H, W); shifts of the augmentation keep their share of the image.

    Raises:
        BadInput: Its files are cut from their centre, which a second resize can't follow.
    """
    if data.preprocess.size == size:
        return data
    if data.preprocess.resize is not None:
        raise BadInput(
            f"input_size {size}: {data.name} comes cut to {data.preprocess.size}; leave input_size out, or give a "
            "folder of images"
        )
    shift = round(data.augmentation.shift * min(size) / min(data.preprocess.size))
    return replace(
        data,
        preprocess=replace(data.preprocess, size=size),
        augmentation=replace(data.augmentation, shift=shift),
        train=ResizedSplit(data.train, size),
        val=ResizedSplit(data.val, size),
        test=ResizedSplit(data.test, size),
    )


def label_tensor(data: ImageData, name: str) -> Tensor:
    """The labels of the split of that name.

    Raises:
        BadInput: They are no tensor.
    """
    labels: object = getattr(data, name).labels
    if not isinstance(labels, Tensor):
        raise BadInput(
            f"--data {data.name}: {name}: labels are {type(labels).__name__}, must be a tensor; convert them with "
            "torch.as_tensor"
        )
    return labels


def _check_normalisation(data: ImageData) -> None:
    """Refuses a normalisation that is not for RGB images in [0, 1]."""
    mean, std = data.preprocess.mean, data.preprocess.std
    if len(mean) != 3 or len(std) != 3 or not all(0 <= m <= 1 for m in mean) or not all(0 < s <= 1 for s in std):
        raise BadInput(
            f"--data {data.name}: mean {tuple(mean)} and std {tuple(std)} are not for RGB images in [0, 1]: three "
            "means in [0, 1], three deviations above 0 and up to 1; divide both by 255 if they are for values up to 255"
        )


def check_data(data: ImageData, task: Task) -> None:
    """Refuses splits whose images are not what is declared, or whose labels do not fit them or the class names.

    Args:
        data: The user's.
        task: Which the data are for.

    Raises:
        BadInput: One line: which split, what is wrong.
    """
    _check_normalisation(data)
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


def _check_places(labels: Tensor, data: ImageData, task: Task, where: str) -> None:
    """Refuses labels that are not one per place of an output; a loss of one's own may take others, alike in all splits.

    They would be compared with outputs all the same, each with each.
    """
    from passdeploy.tasks.base import Task as Base

    by_place = labels.ndim == 3 or type(task).loss is Base.loss
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


def split_train_val(train: Split, fraction: float, seed: int, cap: int = 5000) -> tuple[Split, Split]:
    """Cuts a validation split from the training data: stratified, or, of a class per pixel, at random.

    Args:
        train: All training data.
        fraction: Share that goes to validation; every class gives at least one image when it has two.
        seed: Same seed, same split.
        cap: No more than this many validation images.

    Raises:
        BadInput: There is nothing to cut from.
    """
    if not len(train):
        raise BadInput("split_train_val: there are no training images to cut a validation split from; give some")
    generator = torch.Generator().manual_seed(seed)
    fraction = min(fraction, cap / max(1, len(train)))
    held: list[Tensor] = []
    # An image of a class per pixel is of many: all images are one stratum.
    strata = train.labels if train.labels.ndim == 1 else torch.zeros(len(train))
    for label in strata.unique():
        of_class = torch.nonzero(strata == label).flatten()
        count = min(max(1, round(len(of_class) * fraction)), len(of_class) - 1)
        held.append(of_class[torch.randperm(len(of_class), generator=generator)[:count]])
    val_indices = torch.cat(held).sort().values
    keep = torch.ones(len(train), dtype=torch.bool)
    keep[val_indices] = False
    return SubSplit(train, torch.nonzero(keep).flatten()), SubSplit(train, val_indices)


def evenly(split: Split, count: int) -> Tensor:
    """Indices (count,) spread over a split, repeated where it is smaller: splits are often sorted by class."""
    return torch.arange(count) * len(split) // count


DataFactory = Callable[[], ImageData]
