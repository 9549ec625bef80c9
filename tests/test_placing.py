"""How networks lie in memory while they train."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from passdeploy.placing import layout, place
from passdeploy.training import TrainSettings, train
from tests import scripted

CPU = torch.device("cpu")


def downsampling(narrow: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, narrow, 3, padding=1), nn.Conv2d(narrow, 8, 1, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, len(scripted.data().classes)),
    )  # fmt: skip


@pytest.mark.parametrize(("narrow", "how"), [(4, torch.contiguous_format), (16, torch.channels_last)])
def test_channels_are_last_where_that_is_safe(narrow: int, how: torch.memory_format) -> None:
    model = downsampling(narrow)
    assert layout(model, CPU) == place(model, CPU) == how
    assert all(p.is_contiguous(memory_format=how) for p in model.parameters() if p.ndim == 4)
    assert layout(model, torch.device("cuda")) == torch.channels_last


def test_what_lay_channels_last_is_put_back() -> None:
    model = downsampling(4).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    place(model, CPU)
    assert all(p.is_contiguous() for p in model.parameters())


def test_narrow_downsampling_layers_can_be_trained() -> None:
    """Channels last this corrupts the heap on CPUs with AVX2, and the process aborts."""
    settings = TrainSettings(batch=32, min_steps=40, epochs=0.01)
    curve = train(downsampling(4), scripted.data(), settings)
    assert curve.step[-1] == 40
