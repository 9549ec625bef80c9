"""A run that is killed goes on where it was, and ends as if it had never been killed.

Kills are SIGKILLs at points counted in events (a training step, a file replaced or removed), so that a failing one can
be repeated.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from passdeploy.dependencies import BUDGET_STAGES, SHARED_STAGES
from tests import resuming, scripted


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[resuming.Parent, Path]]:
    """The parent of the attempts, and its folder."""
    folder = tmp_path_factory.mktemp("resume")
    parent = resuming.Parent(folder)
    yield parent, folder
    parent.close()


@pytest.fixture(scope="module")
def undisturbed(parent: tuple[resuming.Parent, Path]) -> tuple[Path, int]:
    """A run from beginning to end, and its number of events."""
    attempts, out = parent
    assert attempts.make(resuming.undisturbed, out / "reference", out / "events") == 0
    return out / "reference", int((out / "events").read_text())


def outcome(folder: Path) -> dict[str, Any]:
    """What must be the same: everything but times, dates and the machine."""
    report = json.loads((folder / "report.json").read_text())
    del report["timing_s"], report["environment"], report["provenance"]["created"]
    files = ("structure.json", "architecture.json", "model.safetensors", "prompt.safetensors", "model.onnx")
    return {"report": report, **{name: (folder / name).read_bytes() for name in files}}


def test_the_same_seed_gives_the_same_run(undisturbed: tuple[Path, int]) -> None:
    """`warm` trained the dense network in the parent, the reference in a fork."""
    reference, _ = undisturbed
    name = "dense/dense.safetensors"
    assert (reference / name).read_bytes() == (reference.parent / "warm" / name).read_bytes()


def test_killed_ten_times(parent: tuple[resuming.Parent, Path], undisturbed: tuple[Path, int], tmp_path: Path) -> None:
    attempts, _ = parent
    reference, events = undisturbed
    draw = random.Random(20240717)
    run, log = tmp_path / "run", tmp_path / "log"
    killed_in = []
    for kill in range(10):
        at = draw.randint(1, events // 5)
        status = attempts.make(resuming.killed_at, run, at, log)
        assert status == -signal.SIGKILL, f"kill {kill} at event {at}: {status}"
        killed_in.append((at, log.read_text()))
    assert attempts.make(resuming.undisturbed, run, log) == 0
    assert outcome(run) == outcome(reference), killed_in


def stages_from(name: str) -> list[str]:
    everything = [stage for stage in (*SHARED_STAGES, *BUDGET_STAGES) if stage != "alternatives"]  # off in these runs
    return everything[everything.index(name) :]


def test_stopped_in_the_middle_of_training(
    parent: tuple[resuming.Parent, Path], undisturbed: tuple[Path, int], tmp_path: Path
) -> None:
    """Killed in the search, interrupted by Ctrl-C in the fine-tuning: each goes on from its checkpoint."""
    attempts, _ = parent
    reference, _ = undisturbed
    run, steps, said, log = (tmp_path / name for name in ("run", "steps", "stderr", "log"))
    shutil.copytree(reference, run)
    for name in stages_from("search"):
        shutil.rmtree(run / name)
    assert attempts.make(resuming.killed_in_training, run, steps, log) == -signal.SIGKILL
    assert (run / ".partial" / "search" / "search.ckpt").exists()
    assert attempts.make(resuming.interrupted_in_finetuning, run, steps, said, log) == 130
    lines = [line for line in said.read_text().splitlines() if line.strip()]
    assert lines == ["interrupted: the same command continues where it stopped"]
    assert json.loads(steps.read_text())[0] == 58  # the search, from its last checkpoint
    assert (run / ".partial" / "finetune" / "finetune.ckpt").exists()
    assert attempts.make(resuming.watched, run, steps, log) == 0
    assert (
        json.loads(steps.read_text())[0] == 58
    )  # the fine-tuning likewise: both save between the points of their curves
    assert outcome(run) == outcome(reference)


def test_a_layer_that_draws_at_random_is_resumed_exactly(one_thread: None, tmp_path: Path) -> None:
    from torch import nn

    from passdeploy.checkpoint import Checkpoint
    from passdeploy.search.prompt import InputStage, Prompted
    from passdeploy.training import TrainSettings, train

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
        train(broken, data, settings, curve_every=5, checkpoint=Checkpoint(tmp_path / "c.ckpt", 0, 0), progress=stop)
    torch.manual_seed(99)
    resumed = model()
    torch.rand(7)
    got = train(resumed, data, settings, curve_every=5, checkpoint=Checkpoint(tmp_path / "c.ckpt", 0, 0))
    assert vars(got) == vars(expected)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
