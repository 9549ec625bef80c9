"""What the rest of the program needs to know about a data set."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from passdeploy.errors import BadInput

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


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
            if not len(split):
                continue
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


def split_train_val(train: Split, fraction: float, seed: int, cap: int = 5000) -> tuple[Split, Split]:
    """Cuts a validation split from the training data: stratified, or, of a class per pixel, at random.

    Args:
        train: All training data.
        fraction: Share that goes to validation; every class gives at least one image when it has two.
        seed: Same seed, same split.
        cap: No more than about this many validation images, but for one of every class.

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
