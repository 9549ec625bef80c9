"""One class per image; judged by top-1 accuracy."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from passdeploy.tasks.base import Task, register

if TYPE_CHECKING:
    from passdeploy.data.base import ImageData


class Accuracy:
    """Share of the images that get the right class.

    Args:
        ignore: Label of images that do not count.
    """

    def __init__(self, ignore: int) -> None:
        self.ignore = ignore
        self.right = self.seen = 0

    def add(self, outputs: Tensor, labels: Tensor) -> None:
        """Takes logits (N, classes) and labels (N,)."""
        counts = labels != self.ignore
        self.right += int(((outputs.argmax(1) == labels) & counts).sum())
        self.seen += int(counts.sum())

    def value(self) -> float:
        """In 0 .. 1; 0 without images."""
        return self.right / max(1, self.seen)


@register
class Classification(Task):
    """Logits (N, classes), labels (N,)."""

    name: ClassVar[str] = "classification"
    metric_name: ClassVar[str] = "top-1 accuracy"

    def output_shape(self, data: ImageData) -> tuple[int, ...]:
        return (data.num_classes,)

    def describe(self, shape: tuple[int, ...]) -> str:
        return "(N, classes)"

    def metric(self, classes: int) -> Accuracy:
        return Accuracy(self.ignore)
