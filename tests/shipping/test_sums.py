from __future__ import annotations

import os
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from passdeploy.errors import BadInput
from passdeploy.shipping import sums
from passdeploy.shipping.sums import Refused

DIGEST = "ab" * 32


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "b"
    (root / "sub").mkdir(parents=True)
    (root / "a.txt").write_text("a")
    (root / "sub" / "b.bin").write_bytes(bytes(range(256)))
    sums.write(root)
    return root


def test_written_is_read_back(folder: Path) -> None:
    sealed = sums.open_sealed(folder)
    assert list(sealed.sums) == ["a.txt", "sub/b.bin"]
    assert sealed.read("sub/b.bin") == bytes(range(256))
    assert sealed.root == sums.digest_file(folder / "SHA256SUMS")


def test_the_standard_tool_agrees(folder: Path) -> None:
    import subprocess

    done = subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "sub/b.bin: OK" in done.stdout


@pytest.mark.parametrize(
    "text",
    [
        "",
        f"{DIGEST}  a.txt",
        f"{DIGEST} *a.txt\n",
        f"{DIGEST.upper()}  a.txt\n",
        f"{DIGEST[:-1]}  a.txt\n",
        f"{DIGEST}  ../a.txt\n",
        f"{DIGEST}  /etc/passwd\n",
        f"{DIGEST}  a/../b\n",
        f"{DIGEST}  ./a\n",
        f"{DIGEST}  a//b\n",
        f"{DIGEST}  a\\b\n",
        f"{DIGEST}  SHA256SUMS\n",
        f"{DIGEST}  a.txt\r\n",
        f"\n{DIGEST}  a.txt\n",
        f"{DIGEST}  b\n{DIGEST}  a\n",
        f"{DIGEST}  a\n{DIGEST}  a\n",
        f"# comment\n{DIGEST}  a\n",
    ],
)
def test_read_strictly(text: str) -> None:
    with pytest.raises(Refused) as error:
        sums.parse(text.encode())
    assert "\n" not in str(error.value)


@given(st.dictionaries(st.text(string.ascii_lowercase, min_size=1, max_size=6), st.binary(min_size=32, max_size=32)))
def test_any_plain_names_survive(entries: dict[str, bytes]) -> None:
    text = "".join(f"{entries[name].hex()}  {name}\n" for name in sorted(entries)).encode()
    if entries:
        assert sums.parse(text) == {name: value.hex() for name, value in entries.items()}
    else:
        with pytest.raises(Refused):
            sums.parse(text)


def refusal(folder: Path) -> str:
    with pytest.raises(Refused) as error:
        sums.open_sealed(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_missing_added_changed(folder: Path) -> None:
    (folder / "a.txt").rename(folder / "c.txt")
    assert "a.txt: listed" in refusal(folder)
    (folder / "c.txt").rename(folder / "a.txt")
    (folder / ".hidden").write_text("")
    assert ".hidden: not listed" in refusal(folder)
    (folder / ".hidden").unlink()
    (folder / "empty").mkdir()
    assert "empty" in refusal(folder)
    (folder / "empty").rmdir()
    (folder / "a.txt").write_text("b")
    assert "a.txt: content" in refusal(folder)


def test_links_are_refused_even_to_the_same_content(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "same").write_text("a")
    (folder / "a.txt").unlink()
    (folder / "a.txt").symlink_to(tmp_path / "same")
    assert "a.txt: a link" in refusal(folder)
    (folder / "a.txt").unlink()
    os.mkfifo(folder / "a.txt")
    assert "a.txt: a link or special file" in refusal(folder)


def test_a_linked_folder_and_linked_sums_are_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "sub").rename(tmp_path / "sub")
    (folder / "sub").symlink_to(tmp_path / "sub")
    assert "sub: a link" in refusal(folder)
    (folder / "sub").unlink()
    (tmp_path / "sub").rename(folder / "sub")
    (folder / "SHA256SUMS").rename(tmp_path / "sums")
    (folder / "SHA256SUMS").symlink_to(tmp_path / "sums")
    assert "SHA256SUMS: not a plain file" in refusal(folder)


def test_no_sums_and_no_folder(tmp_path: Path) -> None:
    assert "no SHA256SUMS" in refusal(tmp_path)
    with pytest.raises(BadInput, match="no such bundle"):
        sums.open_sealed(tmp_path / "nothing")


def test_what_changes_after_opening_is_noticed_when_read(folder: Path) -> None:
    sealed = sums.open_sealed(folder)
    (folder / "a.txt").write_text("x")
    with pytest.raises(Refused, match=r"a\.txt: content"):
        sealed.read("a.txt")
    with pytest.raises(Refused, match="not listed"):
        sealed.read("../secret")


def test_a_copy_is_of_the_bundle_that_was_opened(folder: Path, tmp_path: Path) -> None:
    sealed = sums.open_sealed(folder)
    assert sums.open_sealed(sealed.copy(tmp_path / "copy")).root == sealed.root
    (folder / "added").write_text("")
    sums.write(folder)
    with pytest.raises(Refused, match="SHA256SUMS: was changed"):
        sealed.copy(tmp_path / "other")


def test_large_bundles_are_hashed_by_several_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index in range(9):
        (tmp_path / f"{index}.bin").write_bytes(bytes([index]) * (1000 + index))
    root = sums.write(tmp_path)
    monkeypatch.setattr(sums, "_WORTH_THREADS", 0)
    assert sums.open_sealed(tmp_path).root == root
    (tmp_path / "7.bin").write_bytes(bytes([7]) * 1006 + b"!")
    with pytest.raises(sums.Refused, match=r"7\.bin: content does not match"):
        sums.open_sealed(tmp_path)
