"""CIFAR-10 that is damaged is refused in one line; the whole one is read by every comparison that is run on it."""

from __future__ import annotations

import io
import lzma
import pickle
from pathlib import Path

import numpy as np
import pytest

from passdeploy import data
from passdeploy.data import cifar10
from passdeploy.errors import BadInput

BATCHES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def batch(images: int) -> bytes:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (images, 3072), dtype=np.uint8)
    return pickle.dumps({b"data": pixels, b"labels": [int(i) % 10 for i in range(images)]})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of small batches; nothing of this machine's own is found."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in BATCHES:
        (folder / name).write_bytes(batch(2))
    monkeypatch.setattr(cifar10, "search_path", lambda: [tmp_path])
    return folder


class Code:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("ran",)


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (batch(2)[:-400], "cannot be read"),
        (b"\x80", "cannot be read"),
        (b"<html>Not found</html>", "cannot be read"),
        (pickle.dumps({b"data": 1}), "cannot be read"),
        (pickle.dumps(Code()), r"builtins\.print does not belong in a CIFAR-10 batch"),
        (None, r"No such file.*test_batch"),
        (batch(2), r"holds images \(12, 3, 32, 32\)"),
    ],
)
def test_damaged_batches(folder: Path, content: bytes | None, wanted: str, capsys: pytest.CaptureFixture[str]) -> None:
    if content is None:
        (folder / "test_batch").unlink()
    else:
        (folder / "test_batch").write_bytes(content)
    with pytest.raises(BadInput, match=wanted) as refused:
        data.load("cifar10")
    assert "get it again" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert capsys.readouterr().out == ""


def archive() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, jpeg=np.zeros(8, np.uint8), offset=np.array([0, 8]), is_train=np.ones(1), label=np.zeros(1))
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content", [b"no archive", lzma.compress(b"no arrays"), lzma.compress(archive()), lzma.compress(archive())[:-20]]
)
def test_damaged_jpegs(folder: Path, content: bytes) -> None:
    path = folder.parent / cifar10.JPEG_FILE
    path.write_bytes(content)
    with pytest.raises(BadInput, match=r"cifar10_jpeg\.npz\.xz: cannot be read .*get it again"):
        data.load("cifar10")
