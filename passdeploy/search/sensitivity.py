"""Measured sensitivity: what removing units and blocks costs, in units of loss. The prior that PASS starts from.

Per channel group the least important units by weight magnitude are masked, a quarter, a half and three quarters of
them; per residual block the whole branch. The cost is the KL divergence from the dense network's outputs on training
images, with batch statistics (what re-estimation would give). A unit's importance is its share of the slope of its
group's curve, so that summed importances of removed units are losses, and width can be traded against depth.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from passdeploy.groups import Masker, macs
from passdeploy.placing import place
from passdeploy.search.method import SearchContext, affordable, training_images
from passdeploy.search.prompt import InputStage, Prompted
from passdeploy.tasks import task_of
from passdeploy.training import autocast, fitting_batch, training_device, use_batch_statistics

SHARES = (0.25, 0.5, 0.75)
OPERATIONS = 6e11
"""Multiply-adds that the whole measurement may cost."""
LEAST = 1e-4
"""Smallest loss attributed to a removed share: keeps importances positive."""


def _curve(points: list[float]) -> list[float]:
    """Loss at the shares 0, 1/4, 1/2, 3/4, 1: made non-decreasing, extrapolated to 1 by its steepest last slope."""
    values = [0.0]
    for point in points:
        values.append(max(values[-1] + LEAST, point))
    slope = max(values[-1] - values[-2], values[-1] / (len(values) - 1))
    return [*values, values[-1] + 2 * slope]


def rising(values: Tensor) -> Tensor:
    """The nearest rising sequence of the same sum: neighbours that fall are averaged (pool adjacent violators).

    Averaged ones still rise a little, so that they keep their order.
    """
    blocks: list[tuple[float, int]] = []  # mean and length
    for value in values.tolist():
        mean, length = value, 1
        while blocks and blocks[-1][0] > mean:
            before, held = blocks.pop()
            mean, length = (before * held + mean * length) / (held + length), held + length
        blocks.append((mean, length))
    pooled = torch.cat([torch.full((length,), mean, dtype=values.dtype) for mean, length in blocks])
    return pooled * (1 + 1e-6 * torch.arange(len(values)) / max(1, len(values)))


def spread(magnitude: Tensor, losses: list[float]) -> Tensor:
    """Distributes a group's loss curve over its units.

    Args:
        magnitude: (units,) by which the units are ranked.
        losses: Loss with the lowest 1/4, 1/2, 3/4 of the units removed.

    Returns:
        (units,) importance > 0, rising with the magnitude; its sum over the lowest share of units is the curve's value
        there, as far as a rising order allows, and its sum over all is the curve's last (of four units or more).
    """
    curve = _curve(losses)
    units = len(magnitude)
    ranked = magnitude.argsort()
    importance = torch.zeros(units, dtype=torch.float64)
    bounds = [round(units * k / (len(curve) - 1)) for k in range(len(curve))]
    for segment, (start, end) in enumerate(pairwise(bounds)):
        chosen = ranked[start:end]
        if len(chosen):
            weights = magnitude[chosen].double() + 1e-9
            importance[chosen] = (curve[segment + 1] - curve[segment]) * weights / weights.sum()
    importance[ranked] = rising(importance[ranked])
    return importance.clamp_min(1e-9)


@torch.no_grad()
def measure(context: SearchContext, magnitude: dict[str, Tensor]) -> dict[str, Tensor]:
    """Importance of every unit.

    Args:
        context: Network, groups and training data.
        magnitude: Per group (units,), by which units are ranked inside their group.

    Returns:
        Per group (units,) importance in units of loss, > 0.
    """
    device = training_device()
    model = Prompted(InputStage(context.data.preprocess), copy.deepcopy(context.network))
    how = place(model, device, context.data.input_shape)
    use_batch_statistics(model)
    masker = Masker(model, context.groups, "network.")
    groups = context.groups.groups
    passes = 1 + sum(len(SHARES) if group.kind == "channel" else 1 for group in groups)
    count = affordable([int(macs(context.operators))] * passes, OPERATIONS, 32, 1024)
    images, _ = training_images(context.data, count, context.config.seed)
    images = images.to(device, memory_format=how)
    ones = {group.name: torch.ones(group.units, device=device) for group in groups}
    size = fitting_batch(context.data.train, 256, least=16)  # statistics are those of each part
    parts, task = images.tensor_split(-(-len(images) // size)), task_of(context.data)

    def outputs(masks: dict[str, Tensor]) -> Iterator[Tensor]:
        for part in parts:
            with autocast(device):
                logits = masker(masks, part)
            yield logits

    reference = list(outputs(ones))

    def loss(name: str, mask: Tensor) -> float:
        got = outputs({**ones, name: mask.to(device)})
        each = [task.divergence(a, b) * len(a) / len(images) for a, b in zip(got, reference, strict=True)]
        return float(torch.stack(each).sum().clamp(0, 20).nan_to_num(20.0))

    importance = {}
    for done, group in enumerate(groups):
        if group.kind == "depth":
            importance[group.name] = torch.tensor([max(LEAST, loss(group.name, torch.zeros(1)))], dtype=torch.float64)
        else:
            ranked = magnitude[group.name].argsort()
            losses = []
            for share in SHARES:
                mask = torch.ones(group.units)
                mask[ranked[: round(group.units * share)]] = 0
                losses.append(loss(group.name, mask))
            importance[group.name] = spread(magnitude[group.name], losses)
        context.progress(done + 1, len(groups), "measuring sensitivities")
    return importance
