"""A child that crashes, hangs or fails costs one line, never the parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import passdeploy
from passdeploy.engines import _child
from passdeploy.engines._child import Server, library_complaint, run_job
from passdeploy.errors import BadInput, NotWritten, Unavailable

PROGRAM = """
import errno, json, os, sys, time
from passdeploy.engines._child import failure, serve
from passdeploy.errors import Unavailable

def fail(how):
    if how == "abort":
        print("[E] the library gave up\\nmore words", file=sys.stderr, flush=True)
        os.abort()
    if how == "exit":
        sys.exit(7)
    if how == "shut":
        os.close(int(sys.argv[1]))
    if how in ("hang", "shut"):
        time.sleep(600)
    if how == "full":
        raise OSError(errno.ENOSPC, "No space left on device")
    if how == "full for the answer":
        open(sys.argv[2], "w").close()
        print("OSError: [Errno 28] No space left on device")
        sys.exit(1)
    if how == "told":
        print("[E] the first engine is damaged", file=sys.stderr, flush=True)
    if how == "unavailable":
        raise Unavailable("no such device")
    raise ValueError("two\\nlines")

if len(sys.argv) == 2:
    serve(int(sys.argv[1]), {"echo": lambda x: x, "fail": fail, "pid": os.getpid})
else:
    job = json.load(open(sys.argv[1]))
    try:
        answer = {"twice": 2 * job["number"]} if "number" in job else fail(job["how"])
    except Exception as error:
        answer = failure(error)
    json.dump(answer, open(sys.argv[2], "w"))
"""


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "child_program.py").write_text(PROGRAM)
    return {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(passdeploy.__path__[0]).parent)])}


def test_a_job_answers(env: dict[str, str]) -> None:
    assert run_job("child_program", {"number": 21}, "test", env=env) == {"twice": 42}


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("abort", "test: its process was killed by SIGABRT: the library gave up"),
        ("exit", "test: its process exited with status 7"),
        ("other", "test: two lines"),
    ],
)
def test_a_failing_job_is_one_line(env: dict[str, str], how: str, said: str) -> None:
    with pytest.raises(BadInput) as error:
        run_job("child_program", {"how": how}, "test", env=env)
    assert str(error.value).startswith(said) and "\n" not in str(error.value)


def test_the_kind_of_error_survives(env: dict[str, str]) -> None:
    with pytest.raises(Unavailable, match="test: no such device"):
        run_job("child_program", {"how": "unavailable"}, "test", env=env)


@pytest.mark.parametrize("how", ["full", "full for the answer"])
def test_a_full_disk_is_told(env: dict[str, str], how: str) -> None:
    with pytest.raises(NotWritten, match=r"test: .*No space left on device"):
        run_job("child_program", {"how": how}, "test", env=env)


def test_a_job_that_hangs_is_ended(env: dict[str, str]) -> None:
    with pytest.raises(BadInput, match="test: no result after 1 s, ended"):
        run_job("child_program", {"how": "hang"}, "test", env=env, timeout=1)


@pytest.mark.parametrize("way", ["job", "server"])
def test_a_child_finds_the_gpus_memory_that_pytorch_kept(
    env: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """A stand-in for PyTorch gives back what the child needs to start at all: its program."""
    program = tmp_path / "child_program.py"
    kept = program.read_text()
    program.unlink()
    initialized = [False]
    cuda = SimpleNamespace(is_initialized=lambda: initialized[0], empty_cache=lambda: program.write_text(kept))
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))  # type: ignore[arg-type]

    def ask() -> object:
        if way == "job":
            return run_job("child_program", {"number": 21}, "test", env=env)["twice"]
        server = Server("child_program", "test", env)
        try:
            return server.ask("echo", 42)
        finally:
            server.stop()

    with pytest.raises(BadInput):
        ask()
    assert not program.exists(), "where CUDA is not in use it stays so"
    initialized[0] = True
    assert ask() == 42


def test_a_child_needs_no_pytorch_here(env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert run_job("child_program", {"number": 21}, "test", env=env) == {"twice": 42}
    assert "torch" not in sys.modules


def test_a_server_answers_fails_and_answers_again(env: dict[str, str]) -> None:
    server = Server("child_program", "test", env)
    try:
        assert server.ask("echo", {"a": [1, 2]}) == {"a": [1, 2]}
        with pytest.raises(BadInput, match="test: two lines"):
            server.ask("fail", "other")
        assert server.ask("echo", 3) == 3
        assert server.ask("pid") != os.getpid()
    finally:
        server.stop()


def test_what_was_said_of_an_earlier_request_explains_nothing_later(env: dict[str, str]) -> None:
    server = Server("child_program", "test", env)
    try:
        with pytest.raises(BadInput, match=r"test: two lines \(the first engine is damaged\)"):
            server.ask("fail", "told")
        with pytest.raises(BadInput, match=r"^test: two lines$"):
            server.ask("fail", "other")
        with pytest.raises(BadInput, match=r"first engine is damaged"):
            server.ask("fail", "told")  # the log goes on where it was
        for _ in range(2):
            with pytest.raises(BadInput, match="killed by SIGABRT: the library gave up"):
                server.ask("fail", "abort")
    finally:
        server.stop()


@pytest.mark.parametrize(("how", "said"), [("abort", "killed by SIGABRT: the library gave up"), ("exit", "status 7")])
def test_a_server_that_dies_is_one_line(env: dict[str, str], how: str, said: str) -> None:
    server = Server("child_program", "test", env)
    with pytest.raises(BadInput, match=said):
        server.ask("fail", how)
    server.stop()


def test_a_server_that_hangs_is_ended(env: dict[str, str]) -> None:
    server = Server("child_program", "test", env)
    pid = server.ask("pid")
    with pytest.raises(BadInput, match="test: no answer to fail after 1 s"):
        server.ask("fail", "hang", timeout=1)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_the_first_error_line_is_what_is_told() -> None:
    text = "[W] careful\n\x1b[91m[E] root cause\x1b[0m\n[E] and what followed\n[!] Invalid engine\n"
    assert library_complaint(text) == "root cause"
    assert library_complaint("Traceback (most recent call last):\n  File x\nValueError: y\n") == "ValueError: y"
    assert library_complaint("") == ""


def test_a_server_that_stops_listening_is_ended(env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_child, "PATIENCE_S", 0.5)
    server = Server("child_program", "test", env)
    with pytest.raises(BadInput, match="test: its process was killed by SIGKILL"):
        server.ask("fail", "shut")
    server.stop()


def test_a_server_that_was_ended_says_so_again(env: dict[str, str]) -> None:
    server = Server("child_program", "test", env)
    with pytest.raises(BadInput, match="no answer to fail"):
        server.ask("fail", "hang", timeout=1)
    with pytest.raises(BadInput, match="its process was killed by SIGKILL"):
        server.ask("echo", 1)


NOTING = """
import os, pathlib, time
from passdeploy.engines._child import answer_job

def wait(job):
    pathlib.Path("pid").write_text(str(os.getpid()))
    time.sleep(600)

answer_job(wait)
"""
COMMAND = """
import sys
from passdeploy import api, cli
from passdeploy.engines._child import run_job
api.run_stage = lambda *_, **__: run_job("noting", {}, "test")
sys.argv = ["passdeploy", "search", "--out", "run"]
cli.main()
"""


def gone(pid: int) -> bool:
    """Whether a process has ended; what nobody has waited for yet has ended, too."""
    try:
        return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends children on Linux alone")
@pytest.mark.parametrize(("how", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_command_that_is_ended_takes_its_children_with_it(
    env: dict[str, str], tmp_path: Path, how: signal.Signals, code: int
) -> None:
    (tmp_path / "noting.py").write_text(NOTING)
    note = tmp_path / "pid"
    command = subprocess.Popen([sys.executable, "-c", COMMAND], env=os.environ | env, cwd=tmp_path)
    deadline = time.monotonic() + 60
    while not (note.exists() and note.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    child = int(note.read_text())
    command.send_signal(how)
    assert command.wait(timeout=60) == code
    while not gone(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert gone(child)
