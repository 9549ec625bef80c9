from __future__ import annotations

import base64
import io

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from passdeploy.reporting.picture import png, prompt_picture, rgb_picture


def decode(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,")))))


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_other_decoders_read_the_same_pixels(height: int, width: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    assert (np.asarray(Image.open(io.BytesIO(png(pixels)))) == pixels).all()


def test_zero_is_mid_grey_and_the_largest_value_is_full_scale() -> None:
    prompt = np.zeros((3, 4, 4))
    prompt[0, 0, 0], prompt[1, 3, 3] = 0.2, -0.1
    image = decode(prompt_picture(prompt))
    assert image[1, 1].tolist() == [128, 128, 128]
    assert image[0, 0].tolist() == [255, 128, 128]
    assert image[3, 3].tolist() == [128, 64, 128]
    assert (decode(prompt_picture(np.zeros((3, 2, 2)))) == 128).all()
    assert (decode(prompt_picture(np.full((3, 2, 2), np.nan))) == 128).all()


def test_large_images_are_thinned() -> None:
    assert decode(rgb_picture(np.ones((3, 512, 300)))).shape == (256, 150, 3)
