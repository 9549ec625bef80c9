"""The input stage: normalisation, and both kinds of prompt."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from passdeploy.data.base import Preprocess
from passdeploy.search.prompt import InputStage, Prompted

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
sizes = st.tuples(st.integers(8, 40), st.integers(8, 40))


def normalised(images: torch.Tensor) -> torch.Tensor:
    return (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


@settings(max_examples=20, deadline=None)
@given(size=sizes, width=st.integers(0, 12))
def test_an_additive_prompt_of_zeros_is_the_normalisation(size: tuple[int, int], width: int) -> None:
    images = torch.rand(2, 3, *size)
    stage = InputStage(Preprocess(size, mean=MEAN, std=STD), "additive", width)
    assert torch.allclose(stage(images), normalised(images), atol=1e-5)
    assert torch.allclose(InputStage(Preprocess(size, mean=MEAN, std=STD))(images), stage(images), atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(size=sizes, width=st.integers(0, 12))
def test_an_additive_prompt_acts_on_its_frame_alone(size: tuple[int, int], width: int) -> None:
    images = torch.rand(2, 3, *size)
    stage = InputStage(Preprocess(size, mean=MEAN, std=STD), "additive", width)
    with torch.no_grad():
        stage.prompt.fill_(2.0)  # type: ignore[union-attr]
        changed = (stage(images) - normalised(images)).abs() > 1
    whole = width == 0 or 2 * width >= min(size)
    inside = slice(width, -width) if not whole else slice(0, 0)
    expected = torch.ones(size, dtype=torch.bool)
    expected[inside, inside] = False
    assert torch.equal(changed, expected.expand(2, 3, *size))
    pixels = stage.pixels()
    assert pixels is not None
    assert pixels.shape == (3, *size)


@settings(max_examples=20, deadline=None)
@given(size=sizes, width=st.integers(1, 3))
def test_an_expansive_prompt_shrinks_the_image(size: tuple[int, int], width: int) -> None:
    images = torch.rand(2, 3, *size)
    stage = InputStage(Preprocess(size, mean=MEAN, std=STD), "expansive", width)
    with torch.no_grad():
        stage.prompt.fill_(7.0)  # type: ignore[union-attr]
        out = stage(images)
    assert out.shape == images.shape
    inner = out[:, :, width:-width, width:-width]
    small = F.interpolate(images, inner.shape[2:], mode="bilinear", align_corners=False)
    assert torch.allclose(inner, normalised(small), atol=1e-4)
    border = torch.ones(size, dtype=torch.bool)
    border[width:-width, width:-width] = False
    assert (out[:, :, border] == 7).all()


def test_the_prompt_learns_and_the_normalisation_does_not() -> None:
    for kind, width in (("additive", 0), ("additive", 2), ("expansive", 2)):
        model = Prompted(InputStage(Preprocess((10, 8)), kind, width), nn.Flatten())
        (model(torch.rand(2, 3, 10, 8)) * torch.linspace(1, 2, 240)).sum().backward()
        assert [name for name, _ in model.named_parameters()] == ["stage.prompt"]
        prompt = model.stage.prompt
        assert prompt is not None
        assert prompt.grad is not None
        frame = torch.zeros(10, 8, dtype=torch.bool)
        if width:
            frame[width:-width, width:-width] = True
        assert (prompt.grad[:, frame] == 0).all()
        assert (prompt.grad[:, ~frame] != 0).all()


@pytest.mark.parametrize(("kind", "width"), [("expansive", 0), ("expansive", 4), ("border", 1)])
def test_impossible_prompts(kind: str, width: int) -> None:
    with pytest.raises(ValueError, match="prompt"):
        InputStage(Preprocess((8, 9)), kind, width)
