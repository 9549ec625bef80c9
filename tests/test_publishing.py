"""Final copies: a signature is not copied over, and a kill leaves the old folder or the new one."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from passdeploy import dependencies
from passdeploy.api import run_stage
from passdeploy.errors import BadInput
from passdeploy.final_copies import FILES, FOLDERS
from passdeploy.publishing import offer_folder, withdraw_folder
from passdeploy.shipping import sums
from passdeploy.workspace import read_json, write_json
from tests.shipping.test_signing import make_keys


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return make_keys(tmp_path / "keys")


@pytest.fixture
def run(copied: Callable[[], Path], keys: tuple[Path, Path]) -> Path:
    """A run whose bundle was signed in place."""
    from passdeploy.shipping.signing import sign_bundle

    folder = copied()
    sign_bundle(folder / "bundle", keys[0])
    return folder


def test_a_signed_bundle_stays_signed(run: Path, keys: tuple[Path, Path]) -> None:
    from passdeploy.shipping.verify import verify

    before = tree(run / "bundle")
    for verb in ("report", "ship", "fit"):
        run_stage(verb, run, quiet=True)
        assert tree(run / "bundle") == before, verb
    assert verify(run / "bundle", keys[1]).ok


def test_a_bundle_of_something_else_replaces_it_and_says_so(run: Path) -> None:
    other = Path(shutil.copytree(run / "ship" / "bundle", run / "other"))
    (other / "model.onnx").write_bytes(b"another network")
    (other / "SHA256SUMS").unlink()
    sums.write(other)
    said = offer_folder(other, run / "bundle")
    assert said is not None and "sign it again" in said
    assert tree(run / "bundle") == tree(other)
    assert offer_folder(other, run / "bundle") is None


def test_a_bundle_that_is_withdrawn_says_that_its_signature_goes(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A fit again, for another version of the backend: the bundle is not of this state any more."""
    record = read_json(run / "compile" / "stage.json")
    record["inputs"]["target"]["backend_version"] = "0"
    write_json(run / "compile" / "stage.json", record)
    run_stage("fit", run)
    assert not (run / "bundle").exists()
    assert f"{run / 'bundle'}: is of an earlier state of the run" in capsys.readouterr().err
    assert withdraw_folder(run / "bundle") is None


@pytest.mark.parametrize("damage", ["content", "added", "sums"])
def test_a_damaged_signed_bundle_is_replaced(run: Path, damage: str) -> None:
    bundle = run / "bundle"
    if damage == "content":
        (bundle / "README.txt").write_text("changed")
    elif damage == "added":
        (bundle / "more.txt").write_text("more")
    else:
        (bundle / "SHA256SUMS").unlink()
    run_stage("ship", run, quiet=True)
    assert tree(bundle) == tree(run / "ship" / "bundle")


def test_what_is_there_already_is_not_written_again(
    copied: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied()
    monkeypatch.setattr(shutil, "copytree", lambda *_: pytest.fail("copied again"))
    run_stage("ship", folder, quiet=True)
    assert read_json(folder / "bundle" / "bundle.json")


def test_a_kill_leaves_the_old_folder_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    point, survived = 0, False
    while not survived:
        point += 1
        root = tmp_path / str(point)
        old, new = root / "bundle", root / "ship"
        for folder, text in ((old, "old"), (new, "new")):
            folder.mkdir(parents=True)
            (folder / "a").write_text(text)
            (folder / "b").write_text(text)
        count = [0]
        with monkeypatch.context() as patch:
            for owner, name in ((shutil, "rmtree"), (shutil, "copytree"), (shutil, "copy2"), (Path, "rename")):

                def counted(*a: Any, real: Any = getattr(owner, name), at: int = point, **k: Any) -> Any:  # noqa: B008
                    count[0] += 1  # noqa: B023 - called at once
                    if count[0] == at:  # noqa: B023
                        raise Killed
                    return real(*a, **k)

                patch.setattr(owner, name, counted)
            try:
                offer_folder(new, old)
                survived = True
            except Killed:
                pass
        assert tree(old) in ({"a": b"old", "b": b"old"}, {"a": b"new", "b": b"new"}), point
        offer_folder(new, old)
        assert tree(old) == {"a": b"new", "b": b"new"}
    assert point > 3
    withdraw_folder(old)
    assert [path.name for path in root.iterdir()] == ["ship"]


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ship").mkdir()
    (tmp_path / "ship" / "a").write_text("a")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copytree", full)
    with pytest.raises(BadInput, match=r"bundle: cannot be written \(No space left on device\); free some space"):
        offer_folder(tmp_path / "ship", tmp_path / "bundle")


def test_a_search_of_another_state_withdraws_what_came_of_the_one_before(
    copied: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied()
    offered = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    finals = {*FILES, *FOLDERS, "dense.onnx"} & offered
    assert {"model.onnx", "engine", "bundle", "report.html", "dense.onnx"} <= finals
    run_stage("search", folder, quiet=True)
    assert finals <= {path.name for path in folder.iterdir()}  # nothing changed
    monkeypatch.setattr(dependencies, "version", lambda: "another")
    run_stage("search", folder, quiet=True)
    assert not finals & {path.name for path in folder.iterdir()}
    run_stage("ship", folder, quiet=True)
    assert finals <= {path.name for path in folder.iterdir()}
