"""Image folders: one subfolder per class, as one tree or as train/ and val/ (or test/)."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from passdeploy.data.base import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Augmentation,
    ImageData,
    Preprocess,
    Split,
    split_train_val,
)
from passdeploy.data.images import SUFFIXES, ImageFiles, in_threads, refusal, upright_size
from passdeploy.errors import BadInput

TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "testing", "val", "valid", "validation")
"""The first of these beside train/ is the test set; validation is always cut from the training data."""
LAYOUT = "expected a subfolder of images per class, or train/ and val/ with such subfolders"

NO_CLASSES = ("__pycache__", "__MACOSX", "@eaDir")
"""Folders that other programs leave."""

VAL_SHARE, TEST_SHARE = 0.15, 0.2
MIN_PER_CLASS = 5
CACHE_BYTES = 2**30
CHECK_FILES = 20_000
"""Headers of at most this many files are read before the run; of a larger folder, an even sample."""
CHECK_PIXELS = 500e6
"""A folder of no more pixels is decoded before the run, which takes seconds, so that damage shows at once."""
LARGEST_SIDE = 1024
SMALL_SIDE = 128

Tree = dict[str, list[Path]]


def load_folder(
    path: str | Path,
    size: tuple[int, int] | None = None,
    *,
    mean: tuple[float, float, float] | None = None,
    std: tuple[float, float, float] | None = None,
    seed: int = 0,
) -> ImageData:
    """Loads a folder of images.

    Args:
        path: Holds train/ and val/ (or test/), or class folders that are split into train, val and test.
        size: (H, W) of the network's input. None: the images' own when all have the same (sides up to 1024 pixels),
            else 224 x 224 cut from the centre after resizing the shorter side to 256.
        mean: Of the normalisation, per channel on [0, 1]. None: ImageNet's for inputs of at least 128 pixels, which
            nearly every network of that size was trained with; for smaller ones that of the training images.
        std: Likewise.
        seed: Of the splits; same seed and files, same splits.

    Raises:
        BadInput: The folder can't be used; names the file or folder and says what to do.
    """
    root = Path(path)
    train_tree, test_tree = _trees(root)
    classes = tuple(train_tree)
    trees = [tree for tree in (train_tree, test_tree) if tree is not None]
    files = [file for tree in trees for of_class in tree.values() for file in of_class]
    sizes = _sizes(root, files)
    preprocess = _preprocess(root, sizes, size)
    keep = len(files) * 3 * math.prod(preprocess.size) <= CACHE_BYTES
    splits = [_split(root, tree, preprocess, keep) for tree in trees]
    pixels = sum(h * w for h, w in sizes) / len(sizes) * len(files)
    if pixels <= CHECK_PIXELS:
        bad = {file: why for split in splits for file, why in split.undecodable().items()}
        if bad:
            raise BadInput(refusal(root, bad, len(files)))
    train: Split = splits[0]
    if test_tree is None:
        train, test = split_train_val(train, TEST_SHARE, seed, cap=50_000)
    else:
        test = splits[1]
    train, val = split_train_val(train, VAL_SHARE, seed)
    preprocess = _normalised(preprocess, train, mean, std)
    return ImageData(
        name=root.resolve().name,
        classes=classes,
        preprocess=preprocess,
        augmentation=Augmentation(flip=not _told_apart_by_side(classes), shift=max(1, min(preprocess.size) // 16)),
        train=train,
        val=val,
        test=test,
        files=_stamp(root, files),
    )


def _stamp(root: Path, files: list[Path]) -> str:
    """SHA-256 over the names of all files and the sizes of those that are checked: any of them may be replaced."""
    h, step = hashlib.sha256(), math.ceil(len(files) / CHECK_FILES)
    for number, file in enumerate(files):
        size = file.stat().st_size if number % step == 0 else ""
        h.update(f"{file.relative_to(root).as_posix()}\0{size}\n".encode("utf-8", "surrogateescape"))
    return h.hexdigest()


def _trees(root: Path) -> tuple[Tree, Tree | None]:
    """Finds the training tree, or the one tree, and the test tree."""
    if not root.is_dir():
        raise BadInput(f"{root}: {'a file, not a folder' if root.exists() else 'no such folder'}; {LAYOUT}")
    folders = _folders(root)
    by_name = {folder.name.lower(): folder for folder in folders}
    train = next((by_name[name] for name in TRAIN_NAMES if name in by_name), None)
    test = next((by_name[name] for name in TEST_NAMES if name in by_name), None)
    if train is None and test is not None and all(name in (*TRAIN_NAMES, *TEST_NAMES) for name in by_name):
        raise BadInput(f"{root}: has {test.name}/ but no train/; add train/, or name {test} itself to have it split")
    if train is None:
        return _tree(root), None
    if test is None:  # beside a test set, train/ is no class
        classes = [x.name for x in folders if x != train and _images(x)]
        if classes and not _folders(train):
            return _tree(root), None
        if classes:
            raise BadInput(
                f"{root}: has {train.name}/ with folders in it, and {_listed(classes)}: if {train.name} is a class, "
                "give it another name, else move the others away"
            )
    train_tree = _tree(train)
    if test is None:
        return train_tree, None
    test_tree = _tree(test, smallest=1)
    for have, lack, names in (
        (train, test, set(train_tree) - set(test_tree)),
        (test, train, set(test_tree) - set(train_tree)),
    ):
        if names:
            raise BadInput(
                f"{root}: {have.name}/ has {_listed(names)}, which {lack.name}/ lacks; both need the same class folders"
            )
    return train_tree, test_tree


def _tree(root: Path, smallest: int = MIN_PER_CLASS) -> Tree:
    """Image files per class, both in the order of their names."""
    folders = _folders(root)
    for folder in folders:
        try:
            folder.name.encode()
        except UnicodeEncodeError:  # it could stand in no file that says what the classes are
            raise BadInput(f"{root}: the folder name {folder.name!a} is no UTF-8; rename it") from None
    tree = {folder.name: _images(folder) for folder in folders}
    loose = sum(1 for entry in root.iterdir() if _is_image(entry.name) and entry.is_file())
    if not any(tree.values()):
        if loose:
            raise BadInput(
                f"{root}: {loose} images and no class folders; move the images of each class into a subfolder"
            )
        kind = "no images in its subfolders" if folders else "empty" if not any(root.iterdir()) else "no class folders"
        raise BadInput(f"{root}: {kind}; {LAYOUT}")
    if len(tree) == 1:
        only = folders[0]
        inner = [folder.name for folder in _folders(only) if _images(folder)]
        hint = f"did you mean {only}?" if len(inner) > 1 else "two classes or more are needed"
        raise BadInput(f"{root}: one class only ({only.name}); {hint}")
    empty = [name for name, files in tree.items() if not files]
    if empty:
        raise BadInput(f"{root}: no images in {_listed(empty)}; add some or remove the folder")
    scarce = [f"{name} ({len(files)})" for name, files in tree.items() if len(files) < smallest]
    if scarce:
        raise BadInput(f"{root}: fewer than {smallest} images in {_listed(scarce)}; add images or remove the folder")
    return tree


def _folders(root: Path) -> list[Path]:
    try:
        entries = sorted(root.iterdir(), key=lambda entry: entry.name)
        return [e for e in entries if e.is_dir() and not e.name.startswith(".") and e.name not in NO_CLASSES]
    except OSError as error:
        raise BadInput(f"{root}: can't be read ({error.strerror}); give a folder that you may read") from None


def _images(folder: Path) -> list[Path]:
    """Image files at any depth, sorted; links are followed, each folder once."""

    def fail(error: OSError) -> None:
        raise BadInput(f"{error.filename}: can't be read ({error.strerror}); make it readable or remove it")

    found, seen = [], set()
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=fail):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in NO_CLASSES)
        found += [Path(parent, name) for name in names if _is_image(name)]
    return sorted(found)


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith(".")  # noqa: PTH122  (hot)


def _sizes(root: Path, files: list[Path]) -> list[tuple[int, int]]:
    """(H, W) of the files, or of an even sample of them."""
    step = math.ceil(len(files) / CHECK_FILES)
    sample = files[::step]
    sizes, bad = [], {}
    for file, size in zip(sample, in_threads(upright_size, sample), strict=True):
        if isinstance(size, str):
            bad[file] = size
        else:
            sizes.append(size)
    if bad:
        raise BadInput(refusal(root, bad, len(sample)))
    return sizes


def _preprocess(root: Path, sizes: list[tuple[int, int]], size: tuple[int, int] | None) -> Preprocess:
    """The input size, and whether a centre crop is cut."""
    one_size = len(set(sizes)) == 1
    if size is None:
        if one_size and max(sizes[0]) <= LARGEST_SIDE:
            return Preprocess(size=sizes[0])
        return Preprocess(size=(224, 224), resize=256)
    if min(size) < 8 or max(size) > 4096:
        raise BadInput(f"{root}: input size {size[0]}x{size[1]} asked for; both sides must be 8 to 4096 pixels")
    similar = all(abs(h * size[1] - w * size[0]) <= 0.1 * w * size[0] for h, w in set(sizes))
    if similar or size[0] != size[1]:
        return Preprocess(size=size)
    return Preprocess(size=size, resize=round(size[0] * 256 / 224))


def _split(root: Path, tree: Mapping[str, list[Path]], preprocess: Preprocess, keep: bool) -> ImageFiles:
    labels = [label for label, files in enumerate(tree.values()) for _ in files]
    return ImageFiles(root, [f for files in tree.values() for f in files], torch.tensor(labels), preprocess, keep=keep)


def _normalised(
    preprocess: Preprocess,
    train: Split,
    mean: tuple[float, float, float] | None,
    std: tuple[float, float, float] | None,
) -> Preprocess:
    for name, given in (("mean", mean), ("std", std)):
        if given is not None and not (len(given) == 3 and all(math.isfinite(v) for v in given)):
            raise BadInput(f"normalisation: {name} must be three numbers, for red, green and blue in [0, 1]")
    if std is not None and min(std) <= 0:
        raise BadInput("normalisation: std must be greater than zero")
    if mean is None or std is None:
        found = (IMAGENET_MEAN, IMAGENET_STD) if min(preprocess.size) >= SMALL_SIDE else channel_statistics(train)
        mean, std = mean or found[0], std or found[1]
    return Preprocess(size=preprocess.size, resize=preprocess.resize, mean=mean, std=std)


def channel_statistics(
    split: Split, images: int = 512
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation per channel of an even sample of images in [0, 1], rounded to four digits."""
    some = torch.linspace(0, len(split) - 1, min(images, len(split))).long()
    total, squares, count = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64), 0
    for part in some.split(64):
        pixels = split.images(part).double()
        total += pixels.sum((0, 2, 3))
        squares += pixels.square().sum((0, 2, 3))
        count += pixels.numel() // 3
    mean = total / count
    return _triple(mean), _triple((squares / count - mean.square()).clamp_min(0).sqrt().clamp_min(1e-2))


def _triple(values: Tensor) -> tuple[float, float, float]:
    red, green, blue = (round(float(v), 4) for v in values)
    return red, green, blue


def _told_apart_by_side(classes: tuple[str, ...]) -> bool:
    """Whether mirroring an image may change its class: letters, numbers (of digits or of signs), left and right."""
    sides = any(side in name.lower() for name in classes for side in ("left", "right"))
    return sides or all(len(name) == 1 or name.isdigit() for name in classes)


def _listed(names: set[str] | list[str]) -> str:
    shown = sorted(names)
    return ", ".join(shown[:5]) + (f" and {len(shown) - 5} more" if len(shown) > 5 else "")
