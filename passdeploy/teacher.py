"""The dense network as a teacher: it only gives targets, so it may be run in any way that computes the same."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from passdeploy.placing import place
from passdeploy.surgery import relative_difference

AGREEMENT = 1e-3
"""Largest relative difference between the teacher as given and as run."""


class Teacher:
    """Maps images to the dense network's logits, without gradients, as fast as PyTorch can.

    Batch norms are folded into the convolutions before them: in eval mode on a CPU they take as long as the
    convolutions themselves, and the teacher's forward pass is a large share of a training step. A network that cannot
    be traced, or whose trace computes something else, is run as it is.

    Args:
        model: Images in [0, 1] -> logits. It is left alone.
        device: Where it runs.
        input_shape: (C, H, W) of one image.
    """

    def __init__(self, model: nn.Module, device: torch.device, input_shape: tuple[int, ...]) -> None:
        model = copy.deepcopy(model).eval().requires_grad_(False).cpu()
        self._run = self._folded(model, input_shape)
        self._layout = place(self._run, device, input_shape)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Maps (N, C, H, W) to (N, classes)."""
        logits: Tensor = self._run(images.contiguous(memory_format=self._layout))  # the student's may be another
        return logits

    @torch.no_grad()
    def _folded(self, model: nn.Module, input_shape: tuple[int, ...]) -> nn.Module:
        images = torch.rand(2, *input_shape, generator=torch.Generator().manual_seed(0))
        expected = model(images)
        try:
            folded = fuse(model)
            # Three images: what the trace has baked in must not depend on the batch.
            same = relative_difference(expected, folded(images)) <= AGREEMENT
            folded(torch.cat([images, images[:1]]))
        except Exception:  # tracing runs any code of the network's; whatever it raises, the network itself works
            return model
        return folded if same else model
