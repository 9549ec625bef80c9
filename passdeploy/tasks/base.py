"""What training, evaluation and the proofs need to know of a task."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from passdeploy.errors import BadInput

if TYPE_CHECKING:
    from passdeploy.data.base import Augmentation, ImageData

_REGISTRY: dict[str, Task] = {}


class Metric(Protocol):
    """Sums up outputs batch by batch."""

    def add(self, outputs: Tensor, labels: Tensor) -> None:
        """Takes a batch of outputs and labels, both on the CPU."""
        ...

    def value(self) -> float:
        """The metric over all that was added, in 0 .. 1; larger is better."""
        ...


class Task:
    """Classes by cross-entropy, at one place per image or at many; a subclass says what the rest is.

    Outputs are logits (N, classes, ...), labels integers (N, ...) of the places behind the class axis.

    Attributes:
        name: As in `ImageData.task`.
        metric_name: In words, for reports.
    """

    name: ClassVar[str]
    metric_name: ClassVar[str]
    ignore: ClassVar[int] = -100
    """Labels that count nowhere."""

    def check(self, outputs: object, data: ImageData, model: str) -> None:
        """Refuses a network whose outputs for a batch of 2 are not this task's.

        Raises:
            BadInput: One line: what it returns, and what is expected.
        """
        wanted = self.output_shape(data)
        if not isinstance(outputs, Tensor):
            raise BadInput(
                f"--model {model}: must return logits {self.describe(wanted)}, returned {type(outputs).__name__}; "
                "return one tensor (of a dictionary: the entry with the logits)"
            )
        if outputs.ndim != len(wanted) + 1:
            raise BadInput(
                f"--model {model}: must return logits {self.describe(wanted)}, returned {tuple(outputs.shape)}"
            )
        if outputs.shape[1] != wanted[0]:
            raise BadInput(
                f"--model {model}: has {outputs.shape[1]} outputs, {data.name} has {data.num_classes} classes; "
                "let the factory take num_classes, or build it with that many"
            )
        if tuple(outputs.shape[1:]) != wanted:
            raise BadInput(
                f"--model {model}: must return logits {self.describe(wanted)}, returned {tuple(outputs.shape)}; "
                "scale its output to the size of the images"
            )

    def output_shape(self, data: ImageData) -> tuple[int, ...]:
        """Shape of one image's outputs."""
        raise NotImplementedError

    def describe(self, shape: tuple[int, ...]) -> str:
        """A batch's shape in words."""
        return f"(N, {', '.join(map(str, shape))})"

    def metric(self, classes: int) -> Metric:
        """A fresh metric."""
        raise NotImplementedError

    def loss(self, outputs: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
        """Cross-entropy, averaged over all places that count; 0 where none does, which teaches nothing."""
        if not bool((labels != self.ignore).any()):  # the average over nothing is not a number
            return outputs.float().sum() * 0
        return F.cross_entropy(outputs.float(), labels.long(), ignore_index=self.ignore, label_smoothing=smoothing)

    def divergence(self, outputs: Tensor, reference: Tensor, temperature: float = 1.0) -> Tensor:
        """KL divergence from the reference's softened outputs, averaged over all places.

        Of a single output, which has no distribution over classes: the mean squared difference over the reference's
        variance.
        """
        if outputs.shape[1] == 1:
            spread = reference.float().var(correction=0).clamp(min=1e-12)
            return F.mse_loss(outputs.float(), reference.float()) / spread
        got = F.log_softmax(outputs.float() / temperature, 1)
        wanted = F.log_softmax(reference.float() / temperature, 1)
        places = wanted[0, 0].numel()
        return F.kl_div(got, wanted, log_target=True, reduction="batchmean") / places

    def right(self, outputs: Tensor, labels: Tensor) -> tuple[int, int]:
        """Places that get the right class, and all that count: the curve of a training.

        Where labels are not one per place, whatever the loss makes of them: what the metric says of this batch.
        """
        if labels.shape != (len(outputs), *outputs.shape[2:]):
            metric = self.metric(outputs.shape[1])
            metric.add(outputs.detach().float().cpu(), labels.cpu())
            return round(max(0.0, metric.value()) * len(labels)), len(labels)
        counts = labels != self.ignore
        return int(((outputs.argmax(1) == labels) & counts).sum()), int(counts.sum())

    def agreement(self, outputs: Tensor, reference: Tensor) -> float:
        """Share of the places that get the same class from both; of a single output: the same sign."""
        if outputs.shape[1] == 1:
            return float(((outputs > 0) == (reference > 0)).double().mean())
        return float((outputs.argmax(1) == reference.argmax(1)).double().mean())

    def augment(
        self, images: Tensor, labels: Tensor, how: Augmentation, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Random changes of a training batch; labels that are one per pixel are flipped and shifted with their images.

        Args:
            images: (N, 3, H, W).
            labels: (N, ...).
            how: What may be done to them.
            generator: All that is drawn is drawn from it.
        """
        from passdeploy.feeding import augment

        if labels.shape != (len(images), *images.shape[2:]):
            return augment(images, how, generator), labels
        both = augment(torch.cat([images, labels[:, None].to(images.dtype)], 1), how, generator)
        return both[:, :-1].contiguous(), both[:, -1].to(labels.dtype)


def register(task: type[Task]) -> type[Task]:
    """Makes a task known by its name."""
    _REGISTRY[task.name] = task()
    return task


def registered() -> dict[str, Task]:
    """The tasks that have been imported."""
    return _REGISTRY
