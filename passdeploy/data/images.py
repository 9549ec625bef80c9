"""Image files as a split: decoded when they are asked for, whatever their mode and size, and kept when they fit."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from passdeploy.data.base import Preprocess
from passdeploy.environment import usable_cores
from passdeploy.errors import BadInput

SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pbm", ".pnm")
)
_EXIF_ORIENTATION = 274
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ENDS = {b"\xff\xd8": b"\xff\xd9", b"\x89P": b"IEND"}
"""First bytes of JPEG and PNG files, and what stands near their end when they are whole."""

MOST_THREADS = 16
"""That decode: each holds the interpreter's lock for 6 % of its time, so that more would only get in training's way."""

A = TypeVar("A")
B = TypeVar("B")


def in_threads(function: Callable[[A], B], items: Sequence[A]) -> list[B]:
    """Maps over threads, in order: one for each usable core; one less when the main thread does something else."""
    if len(items) < 4:
        return [function(item) for item in items]
    other = threading.current_thread() is not threading.main_thread()
    return list(_threads(max(1, min(MOST_THREADS, usable_cores() - other))).map(function, items))


@functools.cache
def _threads(count: int) -> ThreadPoolExecutor:
    """Those that decode, which whoever decodes at a time shares."""
    return ThreadPoolExecutor(count, "passdeploy-decode")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_threads.cache_clear)  # a fork has no threads but its own


def upright_size(path: Path) -> tuple[int, int] | str:
    """(height, width) as seen when the EXIF orientation is honoured, from the header; or why it can't be read."""
    try:
        with Image.open(path) as image:
            if image.format == "TIFF":  # which Pillow turns itself, when it is read or before
                image.load()
            width, height = image.size
            turned = image.format != "TIFF" and _orientation(image) >= 5
        if not _looks_whole(path):
            decode(path, Preprocess(size=(8, 8)))  # the truth, for files with something appended
    except Exception as error:
        return reason(error)
    return (width, height) if turned else (height, width)


def decode(path: Path, preprocess: Preprocess) -> np.ndarray:
    """Decodes one file.

    Returns:
        uint8 RGB pixels (3, H, W), upright, resized (bilinear, antialiased) and cropped as `preprocess` says.
    """
    with Image.open(path) as image:
        image.load()
        turn = _TRANSPOSE.get(_orientation(image))
        rgb = to_rgb(image if turn is None else image.transpose(turn))
        return np.asarray(fit(rgb, preprocess.size, preprocess.resize)).transpose(2, 0, 1)


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of any mode: grey is repeated, alpha is dropped, 16 bits keep their upper 8.

    Float images count as [0, 1], or as [0, 255] or 16-bit when their values are larger.
    """
    if image.mode.startswith("I"):
        wide = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        bits = 0 if image.mode == "I" and wide.max(initial=0) <= 255 else 8  # 32 bits wide, and yet 8 used
        return Image.fromarray((wide >> bits).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        values = np.nan_to_num(np.asarray(image, np.float64), posinf=0, neginf=0)
        top = values.max(initial=0)
        scale = 255 if top <= 1 else 1 if top <= 255 else 1 / 257
        return Image.fromarray(np.clip(values * scale + 0.5, 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")  # which copies, under the interpreter's lock


def fit(image: Image.Image, size: tuple[int, int], resize: int | None) -> Image.Image:
    """Resizes to `size` (H, W) at once, or the shorter side to `resize` and then crops the centre."""
    height, width = size
    if resize is None:
        return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BILINEAR)
    scale = max(resize / min(image.size), width / image.width, height / image.height)
    wide, high = (int(side * scale + 1e-6) for side in image.size)  # 214 * (256 / 214) is less than 256
    scaled = (max(width, wide), max(height, high))
    if scaled != image.size:
        image = image.resize(scaled, Image.Resampling.BILINEAR)
    left, top = round((scaled[0] - width) / 2), round((scaled[1] - height) / 2)
    return image.crop((left, top, left + width, top + height))


def reason(error: BaseException) -> str:
    """Why a file can't be used, in a few words without its path."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    return "not an image" if text.startswith("cannot identify image file") else text or type(error).__name__


class ImageFiles:
    """Labelled image files; they may be asked for from several threads at once.

    Args:
        root: The data set's folder, for messages.
        files: One path per image.
        labels: int64 (N,).
        preprocess: Size, resize and crop.
        keep: Whether decoded pixels stay in memory (N x 3 x H x W bytes).
    """

    threads: ClassVar[bool] = True

    def __init__(
        self, root: Path, files: Sequence[Path], labels: Tensor, preprocess: Preprocess, *, keep: bool
    ) -> None:
        self.root, self.files, self.labels, self.preprocess = root, files, labels, preprocess
        self._pixels: Tensor | None = None
        if keep:
            self._pixels = torch.empty(len(files), 3, *preprocess.size, dtype=torch.uint8)  # pages come when written
            self._decoded = torch.zeros(len(files), dtype=torch.bool)

    def __len__(self) -> int:
        return len(self.files)

    def images(self, indices: Tensor) -> Tensor:
        """Returns float32 RGB images (len(indices), 3, H, W) in [0, 1].

        Raises:
            BadInput: A file can't be decoded.
        """
        if self._pixels is not None:
            missing = indices[~self._decoded[indices]].unique()
            self._refuse(self._decode(missing.tolist()))
            return self._pixels[indices].float().div_(255)
        images = torch.empty(len(indices), 3, *self.preprocess.size)
        self._refuse(self._decode(indices.tolist(), images.numpy()))
        return images

    def undecodable(self) -> dict[Path, str]:
        """Decodes every file, keeping the pixels if they are to be kept; returns those that fail, with the reason."""
        bad: dict[Path, str] = {}
        for start in range(0, len(self), 1024):
            bad |= self._decode(range(start, min(start + 1024, len(self))))
        return bad

    def _decode(self, indices: Sequence[int], images: np.ndarray | None = None) -> dict[Path, str]:
        """Decodes files in threads, to where pixels are kept, or into `images`: float32, in [0, 1].

        Returns:
            Those that fail, with the reason.
        """

        def one(place: int) -> str | None:
            index = indices[place]
            try:
                pixels = decode(self.files[index], self.preprocess)
            except Exception as error:
                return reason(error)
            if images is not None:
                np.divide(pixels, 255, out=images[place], dtype=np.float32)
            elif self._pixels is not None:
                self._pixels.numpy()[index] = pixels
                self._decoded[index] = True  # last: another thread may be asking
            return None

        failed = in_threads(one, range(len(indices)))
        return {self.files[index]: why for index, why in zip(indices, failed, strict=True) if why is not None}

    def _refuse(self, bad: dict[Path, str]) -> None:
        if bad:
            raise BadInput(refusal(self.root, bad, len(self)))


def refusal(root: Path, bad: dict[Path, str], total: int) -> str:
    """The message about files that can't be used."""
    shown = "; ".join(f"{path.relative_to(root)}: {why}" for path, why in list(bad.items())[:3])
    more = ", ..." if len(bad) > 3 else ""
    return (
        f"{root}: {len(bad)} of {total} images can't be read ({shown}{more}); replace or remove them "
        "(a run that was begun starts over without them)"
    )


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # broken EXIF data: the picture itself may be fine
        return 1


def _looks_whole(path: Path) -> bool:
    """False when a JPEG or PNG file does not end as such files do."""
    with open(path, "rb") as file:
        end = _ENDS.get(file.read(2))
        if end is None:
            return True
        file.seek(-min(file.seek(0, os.SEEK_END), 64), os.SEEK_END)
        return end in file.read()
