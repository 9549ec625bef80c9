"""What an interrupted profile has measured is not measured again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from passdeploy.latency.steps import Steps, from_table
from passdeploy.stages import profile
from passdeploy.workspace import read_json
from tests import scripted


def test_the_steps_of_an_interrupted_profile_are_kept(
    copied: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied()
    shutil.rmtree(folder / "profile")
    running = scripted.start(folder, weights=yaml.safe_load((folder / "config.yaml").read_text())["weights"])
    running.slicer = scripted.slicer(running)  # type: ignore[misc]
    swept: list[Steps] = []

    def sweep(*_: object) -> Steps:
        swept.append(from_table("int8"))  # steps of 32, as nothing else here would have
        return swept[-1]

    def interrupted(*_: object, **named: Any) -> None:
        assert 32 in named["steps"]
        raise KeyboardInterrupt

    monkeypatch.setattr(profile, "steps_of", sweep)
    with monkeypatch.context() as patch:
        patch.setattr(profile, "profile", interrupted)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                running.stage("profile")
    running.stage("profile")
    assert len(swept) == 1
    assert read_json(folder / "profile" / "steps.json") == swept[0].to_json()
