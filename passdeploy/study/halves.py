"""Two data sets out of one: the first half of the classes, and the second."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from passdeploy.data.base import ImageData, Split
from passdeploy.errors import BadInput


@dataclass
class _OfClasses:
    """The images of some classes, relabelled from 0."""

    parent: Split
    indices: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.indices)

    def images(self, indices: Tensor) -> Tensor:
        return self.parent.images(self.indices[indices])


def _part(split: Split, classes: range) -> Split:
    inside = torch.nonzero((split.labels >= classes.start) & (split.labels < classes.stop)).flatten()
    return _OfClasses(split, inside, split.labels[inside] - classes.start)


def halves(data: ImageData) -> tuple[ImageData, ImageData]:
    """Splits by classes.

    Raises:
        BadInput: Fewer than four classes, or a class per pixel: an image shows many.
    """
    if data.train.labels.ndim > 1:
        raise BadInput(
            f"study transfer: images of {data.name} show several classes each, which can't be halved; name a second "
            "set with --to"
        )
    count = data.num_classes
    if count < 4:
        raise BadInput(
            f"study transfer: {data.name} has {count} classes, too few to halve; name a second set with --to"
        )
    parts = []
    for name, classes in (("first", range(count // 2)), ("second", range(count // 2, count))):
        parts.append(
            dataclasses.replace(
                data,
                name=f"{data.name}, {name} half",
                classes=data.classes[classes.start : classes.stop],
                train=_part(data.train, classes),
                val=_part(data.val, classes),
                test=_part(data.test, classes),
            )
        )
    return parts[0], parts[1]
