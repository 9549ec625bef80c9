"""Small PNG pictures as data URIs, for a report that is one file. No imaging library needed."""

from __future__ import annotations

import base64
import struct
import zlib
from typing import Any

import numpy as np


def png(pixels: np.ndarray) -> bytes:
    """Encodes an (H, W, 3) uint8 image as PNG (8-bit RGB; W3C PNG specification, filter 0)."""
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in np.ascontiguousarray(pixels, dtype=np.uint8))

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


def _uri(image: np.ndarray, largest: int = 256) -> str:
    """(3, H, W) floats in [0, 1] as a data URI; big images are thinned to at most `largest` pixels a side."""
    step = -(-max(image.shape[1:]) // largest)
    pixels = np.rint(np.clip(image[:, ::step, ::step], 0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)
    return "data:image/png;base64," + base64.b64encode(png(pixels)).decode()


def prompt_picture(pixels: Any) -> str:
    """The prompt (3, H, W) as a picture: zero is mid grey, the largest absolute value is full scale.

    Args:
        pixels: Array (a tensor on the CPU is one) in units of the normalised input, as `InputStage.pixels` returns it.

    Returns:
        A ``data:image/png;base64,...`` URI for `PromptInfo.png`.
    """
    values = np.nan_to_num(np.asarray(pixels, dtype=np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    scale = float(np.abs(values).max()) or 1.0
    return _uri(0.5 + values / (2 * scale))


def rgb_picture(image: Any) -> str:
    """An image (3, H, W) in [0, 1], for example one with the prompt in place, as a data URI."""
    return _uri(np.nan_to_num(np.asarray(image, dtype=np.float64)))
