"""`passdeploy search|fit|finetune|compile|report|ship --out DIR`: one stage, and what it leaves at the top of DIR."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import passdeploy
from passdeploy.api import run_stage
from passdeploy.data.base import ImageData, SubSplit
from passdeploy.errors import BadInput, PassdeployError
from passdeploy.reporting import load_report
from passdeploy.workspace import read_json, sha256, write_json
from tests import scripted

pytestmark = pytest.mark.usefixtures("exported_once")

AFTER_FIT = ("model.onnx", "engine", "measurements.csv", "report.json", "report.html", "bundle")


def other(num_classes: int = 3) -> nn.Module:
    """Not the network of any run here."""
    network: nn.Module = scripted.CifarResNet((1, 2, 1), num_classes, widths=(16, 16, 24))
    return network


@pytest.fixture
def folder(copied: Callable[[], Path]) -> Path:
    return copied()


def test_the_last_stages_alone_finish_a_run(folder: Path) -> None:
    for name in ("report", "ship", "bundle"):
        shutil.rmtree(folder / name)
    for name in ("report.json", "report.md", "report.html", "model.safetensors"):
        (folder / name).unlink()
    assert run_stage("ship", folder, quiet=True) == [folder / "ship"]
    assert (folder / "bundle" / "SHA256SUMS").exists() and load_report(folder).goal_met
    assert (folder / "model.safetensors").exists() and (folder / "report.html").exists()


def test_what_is_part_of_a_run_is_not_taken_for_the_place_of_another(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BadInput, match=r"it is a bundle, which passdeploy ship .*bundle --server puts"):
        run_stage("ship", folder / "bundle")
    (folder / "2x").mkdir()
    with pytest.raises(BadInput, match=rf"did you mean the run that it is part of, {folder}\?"):
        run_stage("ship", folder / "2x")
    monkeypatch.chdir(folder)
    with pytest.raises(BadInput, match=r"part of, \.\?"):
        run_stage("fit", Path("2x"))
    with pytest.raises(BadInput, match="start one with passdeploy run --out none"):
        monkeypatch.chdir(folder.parent)
        run_stage("fit", Path("none"))


def test_what_is_still_true_stays_and_what_is_not_goes(folder: Path) -> None:
    run_stage("fit", folder, quiet=True)
    assert all((folder / name).exists() for name in AFTER_FIT), "nothing had changed"
    record = read_json(folder / "compile" / "stage.json")
    record["inputs"]["target"]["backend_version"] = "0"
    write_json(folder / "compile" / "stage.json", record)
    run_stage("finetune", folder, quiet=True)
    assert not any((folder / name).exists() for name in AFTER_FIT), "made by another version of the backend"
    assert (folder / "model.safetensors").exists() and (folder / "structure.json").exists()
    run_stage("report", folder, quiet=True)
    assert all((folder / name).exists() for name in AFTER_FIT), "and the bundle is of what was made again, bit by bit"


def test_what_the_proof_refused_is_not_offered_after_an_earlier_stage_either(folder: Path) -> None:
    proof, record = folder / "compile" / "proof.json", folder / "compile" / "stage.json"
    write_json(proof, read_json(proof) | {"ok": False})
    facts = read_json(record)
    write_json(record, facts | {"outputs": facts["outputs"] | {"proof.json": sha256(proof)}})
    for stage in ("compile", "finetune", "fit"):
        if stage == "compile":
            with pytest.raises(PassdeployError, match="does not compute what the network does"):
                run_stage(stage, folder, quiet=True)
        else:
            run_stage(stage, folder, quiet=True)
        assert not any((folder / name).exists() for name in ("model.onnx", "engine", "bundle")), stage
        assert (folder / "dense.onnx").exists() and (folder / "model.safetensors").exists(), stage


def test_a_stage_that_makes_no_sense_says_why(finished: Path, tmp_path: Path) -> None:
    given = str(finished / "dense" / "dense.safetensors")
    scripted.run(tmp_path / "run", latency="40x", weights=given, epochs=0.1, search={"min_steps": 5})
    with pytest.raises(PassdeployError, match="compile: nothing to go on with, since 40x: no structure") as said:
        run_stage("compile", tmp_path / "run", quiet=True, masked=True)
    assert said.value.exit_code == 1
    assert run_stage("report", tmp_path / "run", quiet=True) == [tmp_path / "run" / "report"]


@pytest.mark.parametrize("trained", [True, False])
def test_the_callers_own_network_by_its_factory(tmp_path: Path, trained: bool) -> None:
    """Started from Python with a network (its weights count as trained) or a factory; continued by a verb."""
    settings = scripted.SETTINGS | {"epochs": 0.1, "dense": {"min_steps": 2}, "search": {"min_steps": 5}}
    network = scripted.tiny_resnet() if trained else scripted.tiny_resnet
    passdeploy.run(
        model=network, data="stripes", latency="1.2x", out=tmp_path / "run", quiet=True, **settings
    )  # fmt: skip
    before = (tmp_path / "run" / "dense" / "stage.json").read_bytes()
    shutil.rmtree(tmp_path / "run" / "report")
    with pytest.raises(BadInput, match="give it again with --model module:function"):
        run_stage("report", tmp_path / "run", quiet=True)
    with pytest.raises(BadInput, match=r"is not the network that .* was made from|weights of another architecture"):
        run_stage("report", tmp_path / "run", quiet=True, model="tests.test_stage_verbs:other")
    run_stage("report", tmp_path / "run", quiet=True, model="tests.scripted:tiny_resnet")
    assert (tmp_path / "run" / "dense" / "stage.json").read_bytes() == before
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert "report" in manifest["stages"] and (tmp_path / "run" / "report.json").exists()


def fewer() -> ImageData:
    """The stripes with fewer training images, under the same name."""
    made = scripted.data()
    made.train = SubSplit(made.train, torch.arange(200))
    return made


def test_the_callers_own_data_by_their_factory(tmp_path: Path) -> None:
    """Under whatever name they go: other data of that name are not the run's."""
    settings = scripted.SETTINGS | {"epochs": 0.1, "dense": {"min_steps": 2}, "search": {"min_steps": 5}}
    passdeploy.run(
        model="tiny-resnet", data=fewer(), latency="1.2x", out=tmp_path / "run", quiet=True, **settings
    )  # fmt: skip
    before = (tmp_path / "run" / "dense" / "stage.json").read_bytes()
    shutil.rmtree(tmp_path / "run" / "report")
    with pytest.raises(BadInput, match="its data is the caller's own; give it again with --data module:function"):
        run_stage("report", tmp_path / "run", quiet=True)
    for others in ("stripes", "tests.scripted:data"):
        with pytest.raises(BadInput, match=r"is not the data that .* was made with"):
            run_stage("report", tmp_path / "run", quiet=True, data=others)
    run_stage("report", tmp_path / "run", quiet=True, data="tests.test_stage_verbs:fewer")
    assert (tmp_path / "run" / "dense" / "stage.json").read_bytes() == before
    assert load_report(tmp_path / "run").provenance.data == "stripes"
