"""CIFAR-10 (Krizhevsky 2009): 50,000 + 10,000 colour images of 32x32, ten classes.

Read from the python version's batches, or from `cifar10_jpeg.npz.xz`, a JPEG-recompressed copy whose results are
labelled "CIFAR-10 (JPEG)". Neither is part of the product.
"""

from __future__ import annotations

import io
import lzma
import pickle
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from passdeploy.data import register, search_path
from passdeploy.data.base import ArraySplit, Augmentation, ImageData, Preprocess, split_train_val
from passdeploy.errors import BadInput

JPEG_FILE = "cifar10_jpeg.npz.xz"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class _ArraysOnly(pickle.Unpickler):
    """The official batches are pickles of plain containers and numpy arrays; nothing else is looked up."""

    ALLOWED = frozenset(
        {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),
        }
    )

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} does not belong in a CIFAR-10 batch")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _from_jpeg(path: Path) -> tuple[Tensor, Tensor, Tensor]:
    archive = np.load(io.BytesIO(lzma.decompress(path.read_bytes())))
    jpeg, offset = archive["jpeg"].tobytes(), archive["offset"]
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(jpeg[a:b]))) for a, b in pairwise(offset)])
    train = torch.from_numpy(archive["is_train"].astype(bool))
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(archive["label"]).long(), train


def _from_batches(folder: Path) -> tuple[Tensor, Tensor, Tensor]:
    pixels, labels = [], []
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        with open(folder / name, "rb") as file:
            batch = _ArraysOnly(file, encoding="bytes").load()
        pixels.append(np.asarray(batch[b"data"]).reshape(-1, 3, 32, 32))
        labels.append(np.asarray(batch[b"labels"]))
    train = torch.arange(60000) < 50000
    return torch.from_numpy(np.concatenate(pixels)), torch.from_numpy(np.concatenate(labels)).long(), train


def _read(read: Callable[[Path], tuple[Tensor, Tensor, Tensor]], path: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels (60000, 3, 32, 32), labels, and which are for training.

    Raises:
        BadInput: A file is missing or damaged.
    """
    try:
        pixels, labels, train = read(path)
    except MemoryError:
        raise
    except Exception as error:  # a damaged pickle or archive fails in any way whatever
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BadInput(f"{path}: cannot be read as CIFAR-10 ({reason}); get it again") from error
    if not pixels.shape == (60000, 3, 32, 32) or not len(pixels) == len(labels) == len(train):
        raise BadInput(f"{path}: holds images {tuple(pixels.shape)}, not CIFAR-10's (60000, 3, 32, 32); get it again")
    return pixels, labels, train


@register("cifar10")
def cifar10() -> ImageData:
    """CIFAR-10 with 5,000 of its training images held out for validation."""
    for root in search_path():
        if (root / JPEG_FILE).is_file():
            name, (pixels, labels, is_train) = "cifar10-jpeg", _read(_from_jpeg, root / JPEG_FILE)
            break
        if (root / "cifar-10-batches-py" / "data_batch_1").is_file():
            name, (pixels, labels, is_train) = "cifar10", _read(_from_batches, root / "cifar-10-batches-py")
            break
    else:
        raise BadInput(
            f"cifar10: neither cifar-10-batches-py/ nor {JPEG_FILE} in {', '.join(map(str, search_path()))}; "
            "put one there or set PASSDEPLOY_DATA to its folder"
        )
    train, val = split_train_val(ArraySplit(pixels[is_train], labels[is_train]), fraction=0.1, seed=0)
    return ImageData(
        name=name,
        classes=CLASSES,
        preprocess=Preprocess(size=(32, 32), mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)),
        augmentation=Augmentation(flip=True, shift=4),
        train=train,
        val=val,
        test=ArraySplit(pixels[~is_train], labels[~is_train]),
    )
