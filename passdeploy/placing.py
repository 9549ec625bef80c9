"""Where and how a network lies in memory while it is trained."""

from __future__ import annotations

import torch
from torch import nn


def place(model: nn.Module, device: torch.device) -> None:
    """Moves a model to a device, in place, with its images and convolutions channels last.

    Only what has four dimensions can lie so: PyTorch refuses a model with tensors of five, such as position tables.
    """
    model.to(device)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dim() == 4:
            tensor.data = tensor.data.to(memory_format=torch.channels_last)
