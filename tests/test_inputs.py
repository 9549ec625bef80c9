"""What stages record as their inputs: whatever changes their result has to be among them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from passdeploy.data.base import Augmentation, SubSplit
from passdeploy.dependencies import SHARED_STAGES
from tests import scripted


def opened(folder: Path) -> Any:
    """A copied run, opened again and not started."""
    given = yaml.safe_load((folder / "config.yaml").read_text())["weights"]
    return scripted.start(folder, weights=given)


@pytest.mark.parametrize("change", ["attached", "backend", "scope", "runnable"])
def test_a_fit_depends_on_where_it_was_measured(
    copied: Callable[[], Path], monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """The latency model may come from a file, so it does not change when the hardware is attached after all."""
    running = opened(copied())
    (budget,) = running.runs
    assert budget.space.current("fit", running.inputs("fit", budget))
    if change == "attached":
        running.target = running.target.with_(attached=False)
    elif change == "scope":
        running.config = running.config.model_copy(update={"scope": "end_to_end"})
    elif change == "backend":
        monkeypatch.setattr(scripted.Scripted, "version", lambda _: "another")
    else:
        monkeypatch.setattr(scripted.Scripted, "runnable", lambda *_: "the driver is missing")
    assert not budget.space.current("fit", running.inputs("fit", budget))


def test_a_floor_is_an_input_of_what_it_is_measured_in(copied: Callable[[], Path]) -> None:
    """Below fp32 the engine is judged as well, when it is compiled; training does not know of it."""
    running = opened(copied())
    (budget,) = running.runs
    running.config = running.config.model_copy(update={"min_accuracy": 0.5})
    assert budget.space.current("finetune", running.inputs("finetune", budget))
    assert not budget.space.current("compile", running.inputs("compile", budget))


@pytest.mark.parametrize("change", ["images", "augmentation"])
def test_training_depends_on_the_images_and_on_what_is_done_to_them(copied: Callable[[], Path], change: str) -> None:
    """Also where the dense network was given with its weights, and so comes out the same."""
    running = opened(copied())
    (budget,) = running.runs
    data = running.subject.data
    if change == "images":
        data.train = SubSplit(data.train, torch.arange(200))
    else:
        data.augmentation = Augmentation(flip=True, shift=1)
    assert not running.space.current("search", running.inputs("search"))
    assert not budget.space.current("finetune", running.inputs("finetune", budget))


@pytest.mark.parametrize("stage", ["profile", "search", "fit", "finetune", "compile", "report", "ship"])
def test_what_the_network_executes_is_an_input_of_all_that_executes_it(copied: Callable[[], Path], stage: str) -> None:
    """Also where weights, latencies and scores come out the same: dropout, or a profile that was given."""
    running = opened(copied())
    (budget,) = running.runs
    run = None if stage in SHARED_STAGES else budget
    space = running.space if run is None else budget.space
    assert space.current(stage, running.inputs(stage, run))
    running.subject.architecture = "of other code"
    assert not space.current(stage, running.inputs(stage, run))


@pytest.mark.parametrize("change", ["classes", "licence"])
def test_a_bundle_says_what_the_data_say_now(copied: Callable[[], Path], change: str) -> None:
    """A folder that was given another name, or a licence that was looked up: the networks come out the same."""
    running = opened(copied())
    (budget,) = running.runs
    data = running.subject.data
    if change == "classes":
        data.classes = tuple(f"{name}s" for name in data.classes)
    else:
        data.licence = "CC-BY-4.0"
    assert not budget.space.current("ship", running.inputs("ship", budget))
    assert budget.space.current("report", running.inputs("report", budget)) == (change == "licence")
    assert budget.space.current("bench", running.inputs("bench", budget))
