"""Stages are functions of recorded inputs: run once, kept while nothing changes, never half there."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from passdeploy import workspace
from passdeploy.errors import BadInput
from passdeploy.workspace import Workspace, json_digest, link_file, read_json, sha256, write_atomic, write_json


class Killed(BaseException):
    """Stands for a SIGKILL: nothing in the package catches it."""


@pytest.fixture
def space(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "run")


def write(folder: Path) -> None:
    (folder / "sub").mkdir(exist_ok=True)
    (folder / "a.txt").write_text("a")
    (folder / "sub" / "b.txt").write_text("b")
    (folder / "loop.ckpt").write_text("scratch")


def never(folder: Path) -> None:
    pytest.fail(f"{folder} was run again")


def test_a_stage_runs_once(space: Workspace) -> None:
    assert space.run("s", {"x": 1}, write)
    assert sorted(p.name for p in space.folder("s").rglob("*")) == ["a.txt", "b.txt", "stage.json", "sub"]
    record = space.record("s")
    assert record is not None
    assert record["inputs"] == {"x": 1}
    assert set(record["outputs"]) == {"a.txt", "sub/b.txt"}
    assert not space.run("s", {"x": 1}, never)
    assert set(read_json(space.root / "manifest.json")["stages"]) == {"s"}


def test_what_a_killed_writer_left_is_no_output(space: Workspace) -> None:
    def torn(folder: Path) -> None:
        (folder / ".bundle.x1" / "bundle").mkdir(parents=True)
        (folder / ".bundle.x1" / "bundle" / "half.txt").write_text("half")
        write(folder)

    assert space.run("s", {"x": 1}, torn)
    record = space.record("s")
    assert record is not None and set(record["outputs"]) == {"a.txt", "sub/b.txt"}
    assert not (space.folder("s") / ".bundle.x1").exists()


def test_other_inputs_run_it_again_from_nothing(space: Workspace) -> None:
    space.run("s", {"x": 1}, write)

    def other(folder: Path) -> None:
        assert [p for p in folder.iterdir() if not p.name.startswith(".")] == []
        (folder / "c.txt").write_text("c")

    assert space.run("s", {"x": 2}, other)
    assert not (space.folder("s") / "a.txt").exists()


@pytest.mark.parametrize("damage", ["changed", "gone", "record"])
def test_what_is_damaged_is_made_again(space: Workspace, damage: str) -> None:
    space.run("s", {}, write)
    before = space.digest("s")
    if damage == "changed":
        (space.folder("s") / "a.txt").write_text("A")
    elif damage == "gone":
        (space.folder("s") / "sub" / "b.txt").unlink()
    else:
        (space.folder("s") / "stage.json").write_text('{"inputs"')
    assert space.record("s") is None
    with pytest.raises(BadInput, match="has not run here"):
        space.digest("s")
    assert space.run("s", {}, write)
    assert space.digest("s") == before


@pytest.mark.parametrize("text", ["", '{"schema', "[]"])
def test_records_that_were_copied_in_part_stop_nothing(space: Workspace, text: str) -> None:
    space.run("s", {}, write)
    space.run("t", {}, write)
    (space.root / "manifest.json").write_text(text)
    (space.folder("t") / "stage.json").write_text(text)
    space.update_manifest()
    assert set(read_json(space.root / "manifest.json")["stages"]) == {"s"}

    def fail(folder: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        space.run("u", {}, fail)
    for name in (".inputs.json", ".seconds"):
        (space.root / ".partial" / "u" / name).write_text(text)
    assert space.run("u", {}, write) and space.run("t", {}, write)
    assert set(read_json(space.root / "manifest.json")["stages"]) == {"s", "t", "u"}


def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if nothing had been written in the last seconds."""
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now + 10**10)


def test_files_that_nobody_touches_are_hashed_once(space: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    space.run("s", {"x": 1}, write)
    settled(monkeypatch)
    hashed: list[str] = []
    real = hashlib.file_digest

    def counted(file: Any, name: str) -> Any:
        hashed.append(Path(file.name).name)
        return real(file, name)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    assert space.seconds("s") >= 0
    assert hashed == [], "how long it took stands in the record"
    for _ in range(3):
        assert space.current("s", {"x": 1})
        space.digest("s")
    assert sorted(hashed) == ["a.txt", "b.txt"]


@pytest.mark.parametrize("how", ["in place", "replaced", "dated back"])
def test_a_hashed_file_that_changes_is_seen(space: Workspace, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    space.run("s", {}, write)
    settled(monkeypatch)
    assert space.record("s") is not None
    file = space.folder("s") / "a.txt"
    before = file.stat()
    time.sleep(0.02)  # more than a tick of the file system's clock
    if how == "replaced":
        (file.parent / "new").write_text("A")
        (file.parent / "new").replace(file)
    else:
        file.write_text("A")  # of the same length
        if how == "dated back":
            os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert space.record("s") is None


def test_what_was_just_written_is_hashed_again(space: Workspace) -> None:
    """Within a tick of the file system's clock a second change leaves no trace but the content."""
    space.run("s", {}, write)
    for text in "xyza":
        (space.folder("s") / "a.txt").write_text(text)
        assert (space.record("s") is not None) == (text == "a")


def test_an_interrupted_stage_is_continued(space: Workspace) -> None:
    def stopped(folder: Path) -> None:
        (folder / "log.jsonl").write_text("one\n")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        space.run("s", {"x": 1}, stopped)
    assert space.record("s") is None

    def rest(folder: Path) -> None:
        assert (folder / "log.jsonl").read_text() == "one\n"
        write(folder)

    assert space.run("s", {"x": 1}, rest)
    assert (space.folder("s") / "log.jsonl").exists()


def test_what_other_inputs_left_is_not_continued(space: Workspace) -> None:
    def stopped(folder: Path) -> None:
        (folder / "log.jsonl").write_text("one\n")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        space.run("s", {"x": 1}, stopped)
    space.run("s", {"x": 2}, lambda folder: write(folder) if not (folder / "log.jsonl").exists() else never(folder))


def test_what_other_inputs_left_is_kept_and_taken_up_when_the_change_is_undone(space: Workspace) -> None:
    def stopped(folder: Path) -> None:
        with (folder / "log.jsonl").open("a") as log:
            log.write("one\n")
        raise KeyboardInterrupt

    for x in (1, 2, 1):
        with pytest.raises(KeyboardInterrupt):
            space.run("s", {"x": x, "y": 0}, stopped)
        assert space.changed("s", {"x": 3, "y": 0}) == ["x"]
    assert (space.root / ".partial" / "s" / "log.jsonl").read_text() == "one\none\n"
    assert space.run("s", {"x": 2, "y": 0}, write)
    digest = space.digest("s")
    assert space.changed("s", {"x": 2, "y": 1}) == ["y"]
    assert space.run("s", {"x": 2, "y": 1}, lambda folder: (folder / "c.txt").write_text("c"))  # type: ignore[arg-type, return-value]
    assert space.changed("s", {"x": 2, "y": 0}) == []
    assert not space.run("s", {"x": 2, "y": 0}, never), "finished stages come back, too"
    assert space.digest("s") == digest


@pytest.mark.parametrize("finish", [False, True])
def test_of_what_was_set_aside_the_longer_one_is_kept(
    space: Workspace, monkeypatch: pytest.MonkeyPatch, finish: bool
) -> None:
    now = [0.0]
    monkeypatch.setattr(workspace.time, "monotonic", lambda: now[0])

    def body(folder: Path, seconds: float) -> None:
        now[0] += seconds
        with (folder / "log.jsonl").open("a") as log:
            log.write("one\n")
        if seconds == 100 or not finish:
            raise KeyboardInterrupt

    for x, seconds in ((1, 100), (2, 1), (3, 1)):
        assert space.keeps("s") == (x < 3), "of the third's two predecessors the shorter one goes"
        with contextlib.nullcontext() if finish and x > 1 else pytest.raises(KeyboardInterrupt):
            space.run("s", {"x": x}, lambda folder, seconds=seconds: body(folder, seconds))  # type: ignore[misc]
    space.run("s", {"x": 1}, write)
    assert (space.folder("s") / "log.jsonl").read_text() == "one\n"
    assert space.seconds("s") == 100


def test_the_time_of_all_attempts_counts(space: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(workspace.time, "monotonic", lambda: now[0])

    def takes(seconds: float, then: type[BaseException] | None) -> None:
        def body(folder: Path) -> None:
            now[0] += seconds
            write(folder)
            if then:
                raise then

        space.run("s", {}, body)

    with pytest.raises(KeyboardInterrupt):
        takes(3, KeyboardInterrupt)
    takes(4, None)
    assert space.seconds("s") == 7


def test_killed_at_every_step_of_moving_into_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is removed or renamed last, a finished stage is not computed twice, and never seen half."""
    point, survived = 0, False
    while not survived:
        point += 1
        space = Workspace(tmp_path / f"run{point}")
        space.run("s", {"x": 0}, write)  # an older result is replaced
        counter = [0]
        with monkeypatch.context() as patch:
            for owner, name in ((Path, "unlink"), (Path, "replace"), (shutil, "rmtree"), (os, "fsync")):

                def counted(*a: object, real=getattr(owner, name), counter=counter, at=point, **k: object) -> object:  # type: ignore[no-untyped-def]  # noqa: B008
                    counter[0] += 1
                    if counter[0] == at:
                        raise Killed
                    return real(*a, **k)

                patch.setattr(owner, name, counted)
            try:
                space.run("s", {"x": 1}, write)
                survived = True
            except Killed:
                pass
        again = Workspace(tmp_path / f"run{point}")
        again.run("s", {"x": 1}, write)
        again.update_manifest()
        record = again.record("s")
        assert record is not None
        assert record["inputs"] == {"x": 1}
        assert set(record["outputs"]) == {"a.txt", "sub/b.txt"}
        assert read_json(again.root / "manifest.json")["stages"]["s"]["inputs"] == {"x": 1}
        left = {p.relative_to(again.root).as_posix() for p in again.root.rglob("*") if p.is_file()}
        assert {"s/a.txt", "s/sub/b.txt", "s/stage.json", "manifest.json"} <= left
        assert not any(name.endswith(".ckpt") for name in left if name.startswith("s/"))
    assert point > 5


def test_once_recorded_it_is_not_computed_again(space: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:

        def killed(*_: object) -> None:
            raise Killed

        patch.setattr(Workspace, "_adopt", killed)
        with pytest.raises(Killed):
            space.run("s", {"x": 1}, write)
    assert space.record("s") is None
    assert not space.run("s", {"x": 1}, never)
    assert space.record("s") is not None


def test_a_full_disk(space: Workspace) -> None:
    def full(folder: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(BadInput, match=r"No space left on device.*free some space, then run again") as refused:
        space.run("s", {}, full)
    assert refused.value.exit_code == 2
    assert space.run("s", {}, write)


def test_what_is_not_the_disks_fault_is_said_as_it_is(space: Workspace, tmp_path: Path) -> None:
    def gone(folder: Path) -> None:
        (tmp_path / "photos" / "cat.png").read_bytes()

    with pytest.raises(BadInput, match=r"^s: .*No such file or directory: .*cat\.png'$") as refused:
        space.run("s", {}, gone)
    assert "free some space" not in str(refused.value)
    assert space.run("s", {}, write)


def test_an_atomic_write_keeps_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.json"
    write_json(file, {"a": 1})

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(workspace.os, "fsync", full)
    with pytest.raises(BadInput, match="No space left"):
        write_atomic(file, "other")
    assert read_json(file) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_json_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    for name in ("a.json", "none.json"):
        with pytest.raises(BadInput, match="cannot be read"):
            read_json(tmp_path / name)
    with pytest.raises(ValueError, match="Out of range"):
        write_json(tmp_path / "nan.json", {"a": float("nan")})
    assert json_digest({"a": 1, "b": 2}) == json_digest({"b": 2, "a": 1})
    assert len(sha256(tmp_path / "a.json")) == 64


def test_clear(space: Workspace, tmp_path: Path) -> None:
    space.run("s", {}, write)
    (space.root / "link").symlink_to(tmp_path)
    (tmp_path / "precious").write_text("")
    space.clear()
    assert list(space.root.iterdir()) == []
    assert (tmp_path / "precious").exists()
    (space.root / "thesis.tex").write_text("years")
    with pytest.raises(BadInput, match="not a run directory"):
        space.clear()
    assert (space.root / "thesis.tex").exists()


def test_a_link_that_a_killed_call_has_left_is_made_again(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_text("finished")
    for _ in range(2):
        link_file(source, target)
        assert target.read_text() == source.read_text() == "finished"
    target.unlink()
    target.write_text("half")
    link_file(source, target)
    assert target.samefile(source)


def test_the_time_of_a_killed_attempt_counts_until_it_last_wrote(space: Workspace) -> None:
    """A SIGKILL leaves no one to write down how long it took; the checkpoints tell."""

    def killed(folder: Path) -> None:
        write(folder)
        raise Killed

    with pytest.raises(Killed):
        space.run("s", {"x": 1}, killed)
    partial = space.root / ".partial" / "s"
    clock = partial / ".seconds"
    clock.write_text("5.0")  # as the attempt began: earlier ones took this long
    began = time.time() - 1000
    for path in partial.rglob("*"):
        os.utime(path, (began, began))
    os.utime(partial / "loop.ckpt", (began + 600, began + 600))
    assert space.run("s", {"x": 1}, write)
    assert space.seconds("s") == pytest.approx(605, abs=2)
