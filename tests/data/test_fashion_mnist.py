from __future__ import annotations

import gzip
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from passdeploy import data as datasets
from passdeploy.data import fashion_mnist
from passdeploy.data.base import ImageData
from passdeploy.data.fashion_mnist import FILES, read_idx
from passdeploy.errors import BadInput

needs_data = pytest.mark.skipif(
    None in map(fashion_mnist._find, FILES), reason="dataset-fashion-mnist is not installed (make data)"
)


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def write(folder: Path, count: int = 40, compressed: bool = True) -> None:
    """Four small files of the right form."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for name in FILES:
        array = random.integers(0, 255, (count, 28, 28)) if "images" in name else np.arange(count) % 10
        content = idx(array)
        if compressed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)


@pytest.fixture(scope="module")
def real() -> ImageData:
    return datasets.load("fashion-mnist")


@needs_data
def test_the_real_set(real: ImageData) -> None:
    assert (len(real.train), len(real.val), len(real.test)) == (55_000, 5_000, 10_000)
    assert real.num_classes == 10
    assert real.input_shape == (3, 28, 28)
    assert real.test.labels.bincount().tolist() == [1000] * 10
    assert real.val.labels.bincount().tolist() == [500] * 10
    images = real.train.images(torch.arange(0, 55_000, 50))
    assert images.dtype == torch.float32
    assert images.min() == 0
    assert images.max() == 1
    assert torch.equal(images[:, 0], images[:, 2])
    assert images.mean() == pytest.approx(fashion_mnist.MEAN, abs=0.01)
    assert images.std() == pytest.approx(fashion_mnist.STD, abs=0.01)


@needs_data
def test_labels_belong_to_the_pictures(real: ImageData) -> None:
    """The nearest class mean, from training images, is right for two thirds of the test images."""
    some = torch.arange(0, 55_000, 10)
    pixels, labels = real.train.images(some)[:, 0].flatten(1), real.train.labels[some]
    means = torch.stack([pixels[labels == c].mean(0) for c in range(10)])
    guess = torch.cdist(real.test.images(torch.arange(2000))[:, 0].flatten(1), means).argmin(1)
    assert (guess == real.test.labels[:2000]).float().mean() > 0.6


@needs_data
def test_splits_are_the_same_each_time(real: ImageData) -> None:
    assert datasets.load("fashion-mnist").digest() == real.digest()


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("place", [".", "fashion-mnist", "FashionMNIST/raw"])
def test_found_in_a_given_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, compressed: bool) -> None:
    write(tmp_path / place, compressed=compressed)
    monkeypatch.setenv("PASSDEPLOY_DATA", str(tmp_path))
    monkeypatch.chdir("/")
    data = datasets.load("fashion-mnist")
    assert len(data.train) + len(data.val) == 40
    assert len(data.test) == 40


def test_an_empty_part_of_the_search_path_is_not_the_working_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PASSDEPLOY_DATA", f"/somewhere{os.pathsep}")
    assert datasets.search_path()[:2] == [Path("/somewhere"), datasets.cache_dir()]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.9])
def test_truncated_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    write(tmp_path)
    file = tmp_path / f"{FILES[0]}.gz"
    file.write_bytes(file.read_bytes()[: round(file.stat().st_size * share)])
    monkeypatch.setenv("PASSDEPLOY_DATA", str(tmp_path))
    with pytest.raises(BadInput, match=r"train-images-idx3-ubyte\.gz: cannot be read"):
        datasets.load("fashion-mnist")


@pytest.mark.parametrize(
    "content", [b"", b"\0\0", idx(np.zeros((2, 2)))[:-1], b"\0\0\x0d\x01\0\0\0\0", b"<html>not found</html>"]
)
def test_not_an_idx_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(BadInput, match="cannot be read"):
        read_idx(tmp_path / "file")


def test_a_damaged_archive_is_refused_or_harmless(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 9, (20, 20))
    whole = gzip.compress(idx(array))
    refused = 0
    for position in range(len(whole)):
        content = bytearray(whole)
        content[position] ^= 0xFF
        (tmp_path / "file.gz").write_bytes(content)
        try:
            assert np.array_equal(read_idx(tmp_path / "file.gz"), array)
        except BadInput:
            refused += 1
    assert refused > 0.9 * len(whole)


def test_nowhere_and_no_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing on the search path, and a cache folder that can't be written: one line that says what to install."""
    (tmp_path / "cache").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fashion_mnist, "search_path", lambda: [tmp_path / "empty"])
    with pytest.raises(BadInput, match="dataset-fashion-mnist") as caught:
        datasets.load("fashion-mnist")
    assert "\n" not in str(caught.value)
