"""What an interrupted profile has measured is not measured again."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from passdeploy.console import Ui
from passdeploy.errors import BadInput
from passdeploy.latency.model import LatencyModel
from passdeploy.latency.steps import Steps, from_table
from passdeploy.stages import profile
from passdeploy.workspace import read_json, write_json
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


@pytest.mark.parametrize("cached", [False, True])
def test_what_is_missing_in_the_model_is_said(
    copied: Callable[[], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cached: bool
) -> None:
    folder = copied()
    kept = read_json(folder / "profile" / "profile.json")
    shutil.rmtree(folder / "profile")
    running = scripted.start(folder, weights=yaml.safe_load((folder / "config.yaml").read_text())["weights"])
    running.ui, units = Ui(), list(running.subject.groups.units.values())
    model = LatencyModel.from_json(kept, running.subject.operators, units)
    model.provenance = {**model.provenance, "failed": 2}
    monkeypatch.setattr(profile, "_measured_profile", lambda *_: model)
    if cached:
        del model.provenance["failed"]  # as an earlier version wrote it
    running.stage("profile")
    said = " ".join(capsys.readouterr().err.split())
    assert ("Latency model: fitted without 2 of 32 structures" in said) != cached


def test_measurements_that_are_no_part_of_the_model_are_not_listed(
    copied: Callable[[], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an interrupted profile, perhaps torn, beside a model that another run has put into the cache since."""
    folder = copied()
    kept = read_json(folder / "profile" / "profile.json")
    running = scripted.start(
        tmp_path / "run",
        weights=yaml.safe_load((folder / "config.yaml").read_text())["weights"],
        profile={**scripted.SETTINGS["profile"], "cache": "use"},
    )
    running.slicer = scripted.slicer(running)  # type: ignore[misc]

    def interrupted(*_: object, **named: Any) -> None:
        named["log"].path.write_text('{"digest": "torn')
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(profile, "profile", interrupted)
        patch.setattr(profile.ProfileCache, "load", lambda _: None)
        with pytest.raises(KeyboardInterrupt):
            running.stage("profile")
    assert (tmp_path / "run" / ".partial" / "profile" / "measurements.jsonl").exists()
    model = LatencyModel.from_json(kept, running.subject.operators, list(running.subject.groups.units.values()))
    monkeypatch.setattr(profile.ProfileCache, "load", lambda _: model)
    running.stage("profile")
    assert not (tmp_path / "run" / "profile" / "measurements.jsonl").exists()


def test_a_profile_of_other_settings_is_refused(copied: Callable[[], Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Its latencies would be those of something else; of another machine of that kind they may well serve."""
    folder = copied()
    weights = yaml.safe_load((folder / "config.yaml").read_text())["weights"]
    saved = read_json(folder / "profile" / "profile.json")

    def given(out: str, **provenance: object) -> None:
        file = folder.parent / f"{out}.profile.json"
        write_json(file, saved | {"provenance": saved["provenance"] | provenance})
        running = scripted.start(
            folder.parent / out, weights=weights, profile_file=str(file)
        )  # refuses what does not fit
        running.ui = Ui()
        running.slicer = scripted.slicer(running)  # type: ignore[misc]
        running.stage("profile")

    with pytest.raises(BadInput, match=r"measured for --target a100, this run is for cpu; measure one with"):
        given("name", name="a100")
    with pytest.raises(BadInput, match=r"measured for --batch 8, this run is for 1"):
        given("batch", batch=8)
    with pytest.raises(BadInput, match=r"measured for --threads 4, this run is for 1"):
        given("threads", threads=4)
    with pytest.raises(BadInput, match=r"measured for scope end_to_end, this run is for engine"):
        given("scope", scope="end_to_end")
    for out in ("name", "batch", "threads", "scope"):
        assert not list((folder.parent / out).iterdir()), "nothing was trained, and the corrected command may go there"
    given("device", device="Another CPU", backend_version="0")
    said = " ".join(capsys.readouterr().err.split())
    assert "measured on Another CPU, not" in said and "measured with version 0, not" in said
    assert "pages" not in said
    given("pages", huge_pages=not saved["provenance"]["huge_pages"])
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(
        "with weights in (huge|small) pages, and here they lie in (huge|small) ones; the closed loop", said
    )


def test_what_is_not_attached_goes_by_another_name_and_is_not_corrected(
    single: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    running = scripted.start(single, weights=yaml.safe_load((single / "config.yaml").read_text())["weights"])
    running.ui, running.target = Ui(), running.target.with_(attached=False)
    profile._say_differences(running, {"device": "as it calls itself", "backend_version": "0"})
    said = " ".join(capsys.readouterr().err.split())
    assert said.startswith("Latency model: measured with version 0, not ") and said.count("Latency model") == 1
    assert said.endswith("; nothing is measured here that would correct it.")
    running.target = running.target.with_(name="gpu", attached=True)
    with pytest.raises(BadInput, match="measured for GPU NVIDIA A30, this run is for"):
        profile._refuse_other(running, {"name": "gpu", "device": "NVIDIA A30"})
