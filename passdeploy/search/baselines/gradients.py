"""First-order Taylor importance (Molchanov et al., arXiv 1906.10771): what setting a unit to zero does to the loss.

Each unit has a gate of 1 on its activations; the importance is the squared gradient of the loss with respect to the
gate, averaged over minibatches. A whole block has such a gate as well.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from passdeploy.groups import Masker, macs
from passdeploy.search.method import SearchContext, affordable, training_images
from passdeploy.search.prompt import InputStage, Prompted
from passdeploy.tasks import task_of
from passdeploy.training import training_device

BATCH = 64
OPERATIONS = 3e11
"""Multiply-adds that all forward passes together may cost."""


def taylor(context: SearchContext) -> dict[str, Tensor]:
    """Importance (units,) of every group, blocks included; the network is in eval mode and stays as it is."""
    device = training_device()
    model = Prompted(InputStage(context.data.preprocess), copy.deepcopy(context.network)).to(device).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    masker, task = Masker(model, context.groups, "network."), task_of(context.data)
    count = affordable([int(macs(context.operators))], OPERATIONS, 2 * BATCH, 2048)
    images, labels = training_images(context.data, count, context.config.seed)
    importance = {name: torch.zeros(units, dtype=torch.float64) for name, units in context.groups.units.items()}
    parts = list(zip(images.split(BATCH), labels.split(BATCH), strict=True))
    size = min(BATCH, context.config.train_batch)  # what a training step has memory for
    for done, (some, answers) in enumerate(parts):
        gradients = {name: torch.zeros_like(values) for name, values in importance.items()}
        for few, labelled in zip(some.split(size), answers.split(size), strict=True):
            gates = {name: torch.ones(len(v), device=device, requires_grad=True) for name, v in importance.items()}
            loss = task.loss(masker(gates, few.to(device)), labelled.to(device)) * (len(few) / len(some))
            found = torch.autograd.grad(loss, list(gates.values()), allow_unused=True)
            for name, gradient in zip(gates, found, strict=True):
                if gradient is not None:
                    gradients[name] += gradient.detach().double().cpu()
        for name, gradient in gradients.items():
            importance[name] += gradient.square() / len(parts)
        context.progress(done + 1, len(parts), "gradients")
    return importance
