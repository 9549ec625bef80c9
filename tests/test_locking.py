"""Two processes in one run directory: the second is told so, and neither loses anything."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from passdeploy.errors import BadInput
from passdeploy.locking import LOCK, exclusive, in_turn
from tests import scripted

HOLDER = """
import os, sys, time
from pathlib import Path
from passdeploy.locking import exclusive
with exclusive(Path(sys.argv[1])):
    there, here = os.pipe()
    fork = os.fork() if sys.argv[2:] else None
    if fork == 0:
        os.write(here, b"x")  # its copy of the lock is closed before fork() returns
        time.sleep(600)
    if fork:
        os.read(there, 1)
    print(fork or 0, flush=True)
    sys.stdin.read()
"""


@contextmanager
def held(folder: Path, *more: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Another process that works in the folder, and the pid of its fork."""
    command = [sys.executable, "-c", HOLDER, str(folder), *more]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process, int(process.stdout.readline())
        process.kill()


def test_a_second_process_is_refused_and_deletes_nothing(tmp_path: Path) -> None:
    running = scripted.start(tmp_path)
    (tmp_path / "dense").mkdir()
    with held(tmp_path) as (process, _):
        refusal = rf"another passdeploy works in it \(pid {process.pid}\); wait"
        for fresh in (False, True):
            with pytest.raises(BadInput, match=refusal):
                scripted.start(tmp_path, fresh=fresh)
        for write in (running.run, running.shared, lambda: running.run_until("fit")):
            with pytest.raises(BadInput, match=refusal):
                write()
        assert (tmp_path / "dense").exists()
    scripted.start(tmp_path, fresh=True)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_it_is_held_for_as_long_as_something_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running = scripted.start(tmp_path)
    assert not (tmp_path / LOCK).exists()
    seen = []

    def stage(name: str, run: object = None) -> None:
        seen.append((tmp_path / LOCK).read_text())
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "stage", stage)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            running.run()
    assert seen == [str(os.getpid())] * 2
    assert not (tmp_path / LOCK).exists()


def test_one_process_may_hold_it_several_times(tmp_path: Path) -> None:
    with exclusive(tmp_path):
        with exclusive(tmp_path / ".." / tmp_path.name):
            scripted.start(tmp_path)
        assert (tmp_path / LOCK).exists()
    assert not (tmp_path / LOCK).exists()


def test_a_process_that_was_killed_lets_go_though_its_fork_lives(tmp_path: Path) -> None:
    with held(tmp_path, "fork") as (process, fork):
        try:
            process.kill()
            process.wait()
            assert (tmp_path / LOCK).exists()
            with exclusive(tmp_path):
                assert (tmp_path / LOCK).read_text() == str(os.getpid())
        finally:
            os.kill(fork, signal.SIGKILL)


def test_a_link_in_the_folder_for_temporary_files_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("passdeploy.locking.tempfile.gettempdir", lambda: str(tmp_path / "temporary"))
    with in_turn(tmp_path / "file"):
        pass
    (lock,) = (tmp_path / "temporary").iterdir()
    precious = tmp_path / "precious"
    precious.write_text("kept")
    lock.unlink()
    lock.symlink_to(precious)
    with in_turn(tmp_path / "file"):
        pass
    assert precious.read_text() == "kept"
