"""A run that is killed goes on where it was, and ends as if it had never been killed.

Kills are SIGKILLs at points counted in events (a training step, a file replaced or removed), so that a failing one can
be repeated. Each attempt is a fork of this process: nothing is shared with it but what was imported.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from passdeploy import training
from passdeploy.console import Ui
from passdeploy.pipeline import BUDGET_STAGES, SHARED_STAGES
from tests import scripted

LIMIT_S = 240
SETTINGS: dict[str, Any] = {
    "dense": {"epochs": 2, "min_steps": 60},
    "search": {"min_steps": 60},
    "finetune": {"min_steps": 60},
    "profile": {"seconds": 1e6, "structures": 16},
}


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


def attempt(out: Path, at: int | None, log: Path) -> None:
    """What a forked process does; leaves its number of events behind when it is not killed."""
    killer = Killer(at, log)
    killer.before(Path, "replace")
    killer.before(Path, "unlink")
    killer.before(shutil, "rmtree")
    killer.before(os, "fsync")
    killer.before(Ui, "step")
    # A checkpoint at every chance, not every 15 s.
    training.Checkpoint.__init__.__defaults__ = (0.0,)  # type: ignore[attr-defined]
    scripted.run(out, **SETTINGS)
    log.write_text(str(killer.count))


def forked(job: Callable[[], None]) -> int:
    """Runs `job` in a fork; its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        try:
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, 1)
            job()
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            sys.stderr.flush()
            os._exit(99)
    end = time.monotonic() + LIMIT_S
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError(f"not finished after {LIMIT_S} s")


def outcome(folder: Path) -> dict[str, Any]:
    """What must be the same: everything but times, dates and the machine."""
    report = json.loads((folder / "report.json").read_text())
    del report["timing_s"], report["environment"], report["provenance"]["created"]
    files = ("structure.json", "architecture.json", "model.safetensors", "prompt.safetensors", "model.onnx")
    return {"report": report, **{name: (folder / name).read_bytes() for name in files}}


@pytest.fixture(scope="module")
def undisturbed(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A run from beginning to end, and its number of events."""
    # The exports are imported and made once here; the forks inherit them.
    out = tmp_path_factory.mktemp("resume")
    warm = scripted.start(out / "warm", **SETTINGS)
    scripted.slicer(warm)
    assert forked(lambda: attempt(out / "reference", None, out / "events")) == 0
    return out / "reference", int((out / "events").read_text())


def test_the_same_seed_gives_the_same_run(undisturbed: tuple[Path, int]) -> None:
    """`warm` trained the dense network in this process, the reference in a fork."""
    reference, _ = undisturbed
    name = "dense/dense.safetensors"
    assert (reference / name).read_bytes() == (reference.parent / "warm" / name).read_bytes()


def test_killed_ten_times(undisturbed: tuple[Path, int], tmp_path: Path) -> None:
    reference, events = undisturbed
    draw = random.Random(20240717)
    killed_in = []
    for kill in range(10):
        at = draw.randint(1, events // 5)
        status = forked(lambda at=at: attempt(tmp_path / "run", at, tmp_path / "log"))  # type: ignore[misc]
        assert status == -signal.SIGKILL, f"kill {kill} at event {at}: {status}"
        killed_in.append((at, (tmp_path / "log").read_text()))
    assert forked(lambda: attempt(tmp_path / "run", None, tmp_path / "log")) == 0
    assert outcome(tmp_path / "run") == outcome(reference), killed_in


def stages_from(name: str) -> list[str]:
    everything = [stage for stage in (*SHARED_STAGES, *BUDGET_STAGES) if stage != "alternatives"]  # off in these runs
    return everything[everything.index(name) :]


def training_steps(file: Path, stop_at: int | None, with_signal: int, after: int = 0) -> None:
    """Writes the training steps that this process takes to `file`; stops it at one of them, behind the first few."""
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


def test_stopped_in_the_middle_of_training(undisturbed: tuple[Path, int], tmp_path: Path) -> None:
    """Killed in the search, interrupted by Ctrl-C in the fine-tuning: each goes on from its checkpoint."""
    reference, _ = undisturbed
    run, steps, said = tmp_path / "run", tmp_path / "steps", tmp_path / "stderr"
    shutil.copytree(reference, run)
    for name in stages_from("search"):
        shutil.rmtree(run / name)

    def killed() -> None:
        training_steps(steps, 57, signal.SIGKILL)
        attempt(run, None, tmp_path / "log")

    def interrupted() -> None:
        from passdeploy import api, cli

        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start without one
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        # The search takes its steps 51 to 60 first, then the fine-tuning its own.
        training_steps(steps, 57, signal.SIGINT, after=10)
        api.run_stage = lambda *_, **__: attempt(run, None, tmp_path / "log")  # type: ignore[assignment]
        sys.argv = ["passdeploy", "finetune", "--out", str(run)]
        try:
            cli.main()
        except SystemExit as end:
            sys.stderr.flush()
            os._exit(int(end.code or 0))

    def undisturbed_rest() -> None:
        training_steps(steps, None, 0)
        attempt(run, None, tmp_path / "log")

    assert forked(killed) == -signal.SIGKILL
    assert (run / ".partial" / "search" / "search.ckpt").exists()
    assert forked(interrupted) == 130
    lines = [line for line in said.read_text().splitlines() if line.strip()]
    assert lines == ["interrupted: the same command continues where it stopped"]
    assert json.loads(steps.read_text())[0] == 51  # the search, from its last checkpoint
    assert (run / ".partial" / "finetune" / "finetune.ckpt").exists()
    assert forked(undisturbed_rest) == 0
    assert json.loads(steps.read_text())[0] == 51
    assert outcome(run) == outcome(reference)


def test_a_layer_that_draws_at_random_is_resumed_exactly(one_thread: None, tmp_path: Path) -> None:
    from torch import nn

    from passdeploy.search.prompt import InputStage, Prompted
    from passdeploy.training import Checkpoint, TrainSettings, train

    data = scripted.data()

    def model() -> Prompted:
        torch.manual_seed(1)
        layers = (nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        return Prompted(InputStage(data.preprocess, "additive"), nn.Sequential(*layers, nn.Linear(4, 3)))

    class Stop(Exception):
        pass

    def stop(done: int, total: int, state: str) -> None:
        if done == 13:
            raise Stop

    settings = TrainSettings(epochs=3, batch=32)
    whole = model()
    expected = train(whole, data, settings, curve_every=5)
    broken = model()
    with pytest.raises(Stop):
        train(broken, data, settings, curve_every=5, checkpoint=Checkpoint(tmp_path / "c.ckpt", 0), progress=stop)
    torch.manual_seed(99)
    resumed = model()
    torch.rand(7)
    got = train(resumed, data, settings, curve_every=5, checkpoint=Checkpoint(tmp_path / "c.ckpt", 0))
    assert vars(got) == vars(expected)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
