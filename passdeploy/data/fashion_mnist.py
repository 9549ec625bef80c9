"""Fashion-MNIST (Xiao et al., arXiv 1708.07747): 60,000 + 10,000 grey images of 28x28, ten classes, MIT licence."""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np
import torch

from passdeploy.data import cache_dir, register, search_path
from passdeploy.data.base import ArraySplit, Augmentation, ImageData, Preprocess, split_train_val
from passdeploy.errors import BadInput

CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
MEAN, STD = 0.2860, 0.3530
"""Of the training pixels in [0, 1]."""


def read_idx(path: Path) -> np.ndarray:
    """Reads an IDX file of unsigned bytes, gzipped or not."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        zero, kind, rank = struct.unpack(">HBB", data[:4])
        shape = struct.unpack(f">{rank}I", data[4 : 4 + 4 * rank])
        if zero != 0 or kind != 8:
            raise ValueError("not an IDX file of unsigned bytes")
        return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise BadInput(f"{path}: cannot be read ({error}); delete it and install or download it again") from None


def _find(name: str) -> Path | None:
    for root in search_path():
        for folder in (root, root / "fashion-mnist", root / "FashionMNIST" / "raw"):
            for candidate in (folder / name, folder / f"{name}.gz"):
                if candidate.is_file():
                    return candidate
    return None


def _locate() -> list[Path]:
    found = [_find(name) for name in FILES]
    if None in found:
        from passdeploy._torchvision import torchvision

        try:
            torchvision().datasets.FashionMNIST(str(cache_dir()), download=True)
        except Exception as error:
            raise BadInput(
                f"fashion-mnist: not found in {', '.join(map(str, search_path()))} and the download failed ({error}); "
                "install Debian's dataset-fashion-mnist, or name a folder with its four files in PASSDEPLOY_DATA"
            ) from None
        found = [_find(name) for name in FILES]
    return [path for path in found if path is not None]


def articles() -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Training and test images, uint8 (N, 28, 28), each with its labels (N,)."""
    train_x, train_y, test_x, test_y = (read_idx(path).copy() for path in _locate())
    return (train_x, train_y), (test_x, test_y)


@register("fashion-mnist")
def fashion_mnist() -> ImageData:
    """Fashion-MNIST with 5,000 of its training images held out for validation."""
    train_x, train_y, test_x, test_y = (torch.from_numpy(read_idx(path).copy()) for path in _locate())
    train, val = split_train_val(ArraySplit(train_x[:, None], train_y.long()), fraction=0.1, seed=0)
    return ImageData(
        name="fashion-mnist",
        classes=CLASSES,
        preprocess=Preprocess(size=(28, 28), mean=(MEAN,) * 3, std=(STD,) * 3),
        augmentation=Augmentation(flip=True, shift=2),
        train=train,
        val=val,
        test=ArraySplit(test_x[:, None], test_y.long()),
        licence="MIT",
    )
