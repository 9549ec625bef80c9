"""Training a network's weights (dense, fine-tuning, distillation) and evaluating it.

Everything random is a function of (seed, epoch, step), so that a run continued from a checkpoint is the run that was
never interrupted: on a CPU bit for bit, on a GPU as far as its kernels repeat themselves, which not all do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from passdeploy.checkpoint import Checkpoint
from passdeploy.data.ahead import batches, images_of
from passdeploy.data.base import ImageData, Split
from passdeploy.errors import BadInput
from passdeploy.feeding import steps_per_epoch, training_batches
from passdeploy.placing import eased, laid_out, place
from passdeploy.tasks import Task, get_task, task_of
from passdeploy.teacher import Teacher
from passdeploy.tf32 import single_means_single

Progress = Callable[[int, int, str], None]
"""Called with (steps done, steps in all, one line about the state)."""


LARGEST_GRADIENT = 5.0
"""Norm that gradients are cut to: networks without residual connections diverge in their first steps otherwise."""
EVALUATED_PIXELS = 96 * 96
"""Of an image up to which `evaluate` takes whole batches: their activations have to fit into the device's memory."""


@dataclass(frozen=True)
class TrainSettings:
    """How weights are trained: SGD with Nesterov momentum, linear warm-up, then a cosine to zero.

    `epochs` of the data are at least `min_steps` steps; `extra_steps` come on top.
    """

    epochs: float = 3
    batch: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    warmup: float = 0.1
    distill: float = 0.0
    temperature: float = 2.0
    seed: int = 0
    min_steps: int = 1
    extra_steps: int = 0


@dataclass
class Curve:
    """What a training reports, a value per point: `step` counts optimiser steps."""

    step: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)

    def add(self, step: int, loss: float, accuracy: float) -> None:
        self.step.append(step)
        self.loss.append(round(loss, 5))
        self.accuracy.append(round(accuracy, 5))


def training_device() -> torch.device:
    """The device that trains: CUDA where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """bfloat16 where the hardware multiplies it natively, else None (float32)."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    native = (
        getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
        or getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    )
    return torch.bfloat16 if native else None


def autocast(device: torch.device) -> torch.autocast:
    """What forward passes of a training run under: `autocast_dtype`, or nothing."""
    dtype = autocast_dtype(device)
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)


def finite(loss: Tensor, step: int, lr: float, name: str = "the loss") -> float:
    """The loss, or what else has that name, as a number.

    Raises:
        BadInput: It is not finite.
    """
    value = float(loss.detach())
    if not math.isfinite(value):
        raise BadInput(f"training diverged: {name} is {value} at step {step + 1}; lower the learning rate ({lr:g})")
    return value


def clip_gradients(model: nn.Module, step: int, lr: float) -> None:
    """Shortens gradients of more than `LARGEST_GRADIENT`.

    Raises:
        BadInput: One is not finite, and the weights would be no numbers from here on.
    """
    finite(nn.utils.clip_grad_norm_(model.parameters(), LARGEST_GRADIENT), step, lr, "the gradient's norm")


def learning_rate(step: int, total: int, peak: float, warmup: float) -> float:
    """Linear from 0 over the first `warmup` share of the steps, then a cosine to zero."""
    rise = round(total * warmup)
    if step < rise:
        return peak * (step + 1) / rise
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


def task_loss(task: Task, logits: Tensor, labels: Tensor, teacher: Tensor | None, settings: TrainSettings) -> Tensor:
    """The task's loss, mixed with distillation by `settings.distill` when there is a teacher.

    Distillation is the divergence from the teacher's softened outputs (Hinton et al., arXiv 1503.02531), scaled by T^2.
    """
    loss = task.loss(logits.float(), labels, settings.label_smoothing)  # under autocast they may be bfloat16
    if teacher is None or settings.distill == 0:
        return loss
    softened = task.divergence(logits, teacher, settings.temperature) * settings.temperature**2
    return (1 - settings.distill) * loss + settings.distill * softened


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weights decay; norms, biases and prompts do not."""
    decayed = [p for name, p in model.named_parameters() if p.ndim > 1 and not name.endswith("prompt")]
    kept = {id(p) for p in decayed}
    rest = [p for p in model.parameters() if id(p) not in kept]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def train(
    model: nn.Module,
    data: ImageData,
    settings: TrainSettings,
    *,
    teacher: nn.Module | None = None,
    checkpoint: Checkpoint | None = None,
    progress: Progress | None = None,
    curve_every: int = 50,
) -> Curve:
    """Trains `model` (images in [0, 1] -> logits) in place and leaves it in eval mode.

    Args:
        model: Its input stage included.
        data: Only `data.train` is used.
        settings: Optimiser and schedule.
        teacher: Its outputs on the same augmented images are matched when `settings.distill` > 0.
        checkpoint: Continued from when it holds a state.
        progress: Called after each step.
        curve_every: Steps between two points of the returned curve; the last one stands for half as many to half as
            many again.
    """
    device, checkpoint = training_device(), checkpoint or Checkpoint(None)
    how = place(model.train(), device, data.input_shape)
    tutor = Teacher(teacher, device, data.input_shape) if teacher is not None and settings.distill else None
    total = max(settings.min_steps, round(settings.epochs * steps_per_epoch(data.train, settings.batch)))
    total += settings.extra_steps
    optimiser = torch.optim.SGD(
        parameter_groups(model, settings.weight_decay), lr=0.0, momentum=settings.momentum, nesterov=True
    )
    curve, start = Curve(), 0
    loss_sum, right, seen = 0.0, 0.0, 0  # since the curve's last point
    state = checkpoint.load()
    if state is not None:
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        curve, start = Curve(**state["curve"]), state["step"]
        loss_sum, right, seen = state["sums"]
    task = task_of(data)
    with eased(model):
        for step, images, labels in training_batches(data, settings.batch, settings.seed, total, start):
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(step, total, settings.lr, settings.warmup)
            images = images.to(device, memory_format=how, non_blocking=True)
            labels = labels.to(device, non_blocking=True)
            with autocast(device):
                target = None if tutor is None else tutor(images)
                logits = model(images)
            loss = task_loss(task, logits, labels, target, settings)
            optimiser.zero_grad()
            loss.backward()
            value = finite(loss, step, settings.lr)
            clip_gradients(model, step, settings.lr)
            optimiser.step()
            hits, places = task.right(logits, labels)
            loss_sum, right, seen = (
                loss_sum + value * len(labels),
                right + hits / max(1, places) * len(labels),
                seen + len(labels),
            )
            left = total - (step + 1)
            if left == 0 or ((step + 1) % curve_every == 0 and 2 * left >= curve_every):  # no point of a step or two
                curve.add(step + 1, loss_sum / seen, right / seen)
                loss_sum, right, seen = 0.0, 0.0, 0
            if checkpoint.due():
                checkpoint.save(
                    {
                        "model": model.state_dict(),
                        "optimiser": optimiser.state_dict(),
                        "curve": vars(curve),
                        "step": step + 1,
                        "sums": (loss_sum, right, seen),
                    }
                )
            if progress is not None:
                progress(step + 1, total, f"loss {curve.loss[-1]:.3f}" if curve.loss else "")
    model.eval()
    return curve


def fitting_batch(split: Split, batch: int, least: int = 1) -> int:
    """Images at a time, of a split whose small ones come `batch` at a time: as many pixels of larger ones."""
    if not len(split):
        return batch
    pixels = split.images(torch.arange(1)).shape[-2:].numel()
    return max(least, min(batch, batch * EVALUATED_PIXELS // pixels))


@torch.no_grad()
def evaluate(model: nn.Module, split: Split, batch: int = 500, task: Task | None = None) -> float | None:
    """The task's metric of `model` (images in [0, 1] -> logits) in float32, on the device that trains.

    Args:
        model: Its input stage included; left in eval mode, where it was.
        split: What it is judged on.
        batch: Images at a time; fewer of large ones.
        task: None: classification for a label per image, segmentation for one per pixel.

    Returns:
        In [0, 1]; None where nothing in the split has a label that counts, since then nothing was measured.
    """
    home, device = next((p.device for p in model.parameters()), torch.device("cpu")), training_device()
    model.to(device).eval()
    batch, how = fitting_batch(split, batch), None

    def outputs(images: Tensor) -> Tensor:
        nonlocal how
        images = images.to(device, non_blocking=True)
        how = how or laid_out(model, images)
        return model(images.contiguous(memory_format=how)).cpu()  # type: ignore[no-any-return]

    try:
        with single_means_single():
            return judge(outputs, split, batch, task)
    finally:
        model.to(home)


def judge(call: Callable[[Tensor], Tensor], split: Split, batch: int, task: Task | None = None) -> float | None:
    """The task's metric of a function of images (N, 3, H, W); arguments and result as for `evaluate`."""
    task = task or get_task("classification" if split.labels.ndim == 1 else "segmentation")
    metric, counted = None, False
    for images, labels in batches(split, batch):
        outputs = call(images)
        metric = metric or task.metric(outputs.shape[1])
        metric.add(outputs, labels)
        counted = counted or bool((labels != task.ignore).any())
    if metric is None or not counted:
        return None
    value = metric.value()
    if not -1e-6 <= value <= 1 + 1e-6:  # true of NaN, too
        raise BadInput(
            f"the metric of task {task.name} is {value:.4g}, and has to lie in [0, 1]; divide percent by 100"
        )
    return min(max(value, 0.0), 1.0)


def use_batch_statistics(model: nn.Module) -> None:
    """Puts batch norms in train mode and all else, what drops at random (stochastic depth, dropout), in eval mode."""
    for module in model.eval().modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()


@torch.no_grad()
def reestimate_batch_norm(
    model: nn.Module, data: ImageData, images: int = 2048, batch: int = 256, seed: int = 0
) -> None:
    """Replaces the running statistics of every batch norm by averages over training images, in place.

    Cumulative averages over `images` images; needed after every structural change.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms or len(data.train) < 2:  # of a single image nothing is known of a variance
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))[:images]
    batch = fitting_batch(data.train, batch, least=16)  # what one batch says of a variance must not be chance
    device = next(model.parameters()).device
    training = model.training
    use_batch_statistics(model)
    parts = order.tensor_split(-(-len(order) // batch))  # as large as each other: each counts as much
    with single_means_single():
        how = laid_out(model, data.train.images(order[:1]).to(device))
        for some in images_of(data.train, [part for part in parts if len(part) > 1], batch):
            model(some.to(device, memory_format=how, non_blocking=True))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.train(training)
