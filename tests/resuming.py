"""Attempts at a run, to be killed: each is a fork of a process in which nothing but imports and one export happened.

The process of the tests is no parent for them: whatever engines other tests opened in it left threads behind, and a
fork gets their locks without them. `python -m tests.resuming FOLDER` is the parent; it reads one attempt a line, makes
it, and answers with its exit status.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LIMIT_S = 240
SETTINGS: dict[str, Any] = {
    "dense": {"epochs": 2, "min_steps": 60},
    "search": {"min_steps": 60, "trials": 1},  # every step is one of the search
    "finetune": {"min_steps": 60},
    "profile": {"seconds": 1e6, "structures": 16},
}


class Parent:
    """The parent of the attempts, as the tests see it.

    Args:
        folder: Where it trains a dense network of its own (`warm`), and makes the exports that the forks inherit.
    """

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-m", "tests.resuming", str(folder)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def make(self, attempt: Callable[..., None], *arguments: Path | int | None) -> int:
        """Makes one attempt, a function of this module; its exit status, negative for a signal."""
        assert self._process.stdin is not None and self._process.stdout is not None
        plain = [str(value) if isinstance(value, Path) else value for value in arguments]
        self._process.stdin.write(json.dumps([attempt.__name__, plain]) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the parent of the attempts is gone: its message is above"
        return int(answer)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(LIMIT_S)


class Killer:
    """Counts events, and kills this process at one of them."""

    def __init__(self, at: int | None, log: Path) -> None:
        self.at, self.log, self.count = at, log, 0

    def event(self, what: str) -> None:
        self.count += 1
        if self.count == self.at:
            self.log.write_text(what)
            os.kill(os.getpid(), signal.SIGKILL)

    def before(self, owner: Any, name: str) -> None:
        """Counts an event before each call of `owner.name`."""
        real = getattr(owner, name)

        def counted(*arguments: Any, **named: Any) -> Any:
            self.event(name)
            return real(*arguments, **named)

        setattr(owner, name, counted)


def undisturbed(out: str, log: str) -> None:
    """A run from where it is to its end; leaves its number of events in `log`."""
    killed_at(out, None, log)


def killed_at(out: str, at: int | None, log: str) -> None:
    """A run that is killed at its event number `at`, whose name it leaves in `log`."""
    from passdeploy import training
    from passdeploy.console import Ui
    from tests import scripted

    killer = Killer(at, Path(log))
    killer.before(Path, "replace")
    killer.before(Path, "unlink")
    killer.before(shutil, "rmtree")
    killer.before(os, "fsync")
    killer.before(Ui, "step")
    # A checkpoint at every chance, not every 15 s.
    training.Checkpoint.__init__.__defaults__ = (0.0, 0.0)  # type: ignore[attr-defined]
    scripted.run(Path(out), **SETTINGS)
    Path(log).write_text(str(killer.count))


def killed_in_training(out: str, steps: str, log: str) -> None:
    """Killed in the first training that there is to do."""
    _training_steps(Path(steps), 57, signal.SIGKILL)
    undisturbed(out, log)


def interrupted_in_finetuning(out: str, steps: str, said: str, log: str) -> None:
    """Interrupted by Ctrl-C in the second training, behind the command line; what it says goes to `said`."""
    from passdeploy import api, cli

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start without one
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
    # The search takes its steps 58 to 60 first, then the fine-tuning its own.
    _training_steps(Path(steps), 57, signal.SIGINT, after=3)
    api.run_stage = lambda *_, **__: undisturbed(out, log)  # type: ignore[assignment]
    sys.argv = ["passdeploy", "finetune", "--out", out]
    cli.main()


def watched(out: str, steps: str, log: str) -> None:
    """Undisturbed; leaves the training steps it took in `steps`."""
    _training_steps(Path(steps), None, 0)
    undisturbed(out, log)


def _training_steps(file: Path, stop_at: int | None, with_signal: int, after: int = 0) -> None:
    """Writes the training steps that this process takes to `file`; stops it at one of them, behind the first few."""
    from passdeploy.console import Ui

    real = Ui.step
    taken: list[int] = []

    def step(self: Ui, done: int, total: int, state: str = "") -> None:
        if total == 60:
            taken.append(done)
            file.write_text(json.dumps(taken))
            if done == stop_at and len(taken) > after:
                os.kill(os.getpid(), with_signal)
        real(self, done, total, state)

    Ui.step = step  # type: ignore[method-assign]


def _forked(attempt: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        status = 99
        try:
            attempt()
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    end = time.monotonic() + LIMIT_S
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise TimeoutError(f"not finished after {LIMIT_S} s")


def main() -> None:
    import torch

    from tests import scripted

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    torch.set_num_threads(1)
    scripted.slicer(scripted.start(Path(sys.argv[1]) / "warm", **SETTINGS))
    for line in sys.stdin:
        name, arguments = json.loads(line)
        attempt = globals()[name]
        print(_forked(lambda: attempt(*arguments)), file=answers, flush=True)  # noqa: B023 - called at once


if __name__ == "__main__":
    main()
