"""One class per pixel; judged by the mean intersection over union (mIoU)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from passdeploy.tasks.base import Task, register

if TYPE_CHECKING:
    from passdeploy.data.base import ImageData

IGNORE = 255
"""The label of pixels that count nowhere, as in VOC and Cityscapes."""


class MeanIoU:
    """Intersection over union per class over all images, averaged over the classes that occur in the labels or outputs.

    Args:
        classes: How many there are.
        ignore: Label of pixels that do not count.
    """

    def __init__(self, classes: int, ignore: int) -> None:
        self.classes, self.ignore = classes, ignore
        self.confusion = torch.zeros(classes, classes, dtype=torch.int64)

    def add(self, outputs: Tensor, labels: Tensor) -> None:
        """Takes logits (N, classes, H, W) and labels (N, H, W)."""
        counts = labels != self.ignore
        pairs = labels[counts].long() * self.classes + outputs.argmax(1)[counts]
        self.confusion += torch.bincount(pairs, minlength=self.classes**2).view(self.classes, self.classes)

    def value(self) -> float:
        """In 0 .. 1; 0 without pixels."""
        both = self.confusion.diagonal().double()
        either = self.confusion.sum(0) + self.confusion.sum(1) - both
        seen = either > 0
        return float((both[seen] / either[seen]).mean()) if bool(seen.any()) else 0.0


@register
class Segmentation(Task):
    """Logits (N, classes, H, W) as large as the images, labels (N, H, W)."""

    name: ClassVar[str] = "segmentation"
    metric_name: ClassVar[str] = "mean intersection over union"
    ignore: ClassVar[int] = IGNORE

    def output_shape(self, data: ImageData) -> tuple[int, ...]:
        return (data.num_classes, *data.preprocess.size)

    def describe(self, shape: tuple[int, ...]) -> str:
        return f"(N, classes, {shape[1]}, {shape[2]})"

    def metric(self, classes: int) -> MeanIoU:
        return MeanIoU(classes, self.ignore)
