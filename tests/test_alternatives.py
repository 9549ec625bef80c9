"""The dense network in lower precisions: built, judged and timed beside the engine that ships; it decides nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from passdeploy.compare.rows import RowFile
from passdeploy.compare.runner import Plan, arms_of
from passdeploy.config import make_config
from passdeploy.data.base import ArraySplit
from passdeploy.engines.base import CompileInput, Engine
from passdeploy.errors import BadInput
from passdeploy.reporting import load_report
from passdeploy.stages.accuracy import accuracy_of, at_a_time
from passdeploy.stages.alternatives import lower_precisions
from passdeploy.targets import Target
from tests import scripted

pytestmark = pytest.mark.usefixtures("exported_once")


def again(folder: Path) -> Any:
    """Goes on with a finished run that had been started without alternatives."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    return scripted.run(folder, weights=config["weights"], latency=config["latency"], alternatives=True)


@pytest.fixture(scope="module")
def compared(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run with three budgets, gone on with."""
    folder = tmp_path_factory.mktemp("alternatives") / "run"
    shutil.copytree(finished, folder)
    again(folder)
    return folder


def int8(folder: Path) -> Any:
    found = load_report(folder / "report.json").alternatives
    assert found is not None
    return next(option for option in found.precisions if option.precision == "int8")


def test_fewer_bits() -> None:
    assert lower_precisions("fp32") == ["fp16", "bf16", "int8", "fp8"]
    assert lower_precisions("fp16") == ["int8", "fp8"]
    assert lower_precisions("int8") == []


def test_what_is_short_of_a_batch_is_filled_up_and_not_counted() -> None:
    """90 images in batches of 64: the function only ever sees multiples of the engine's batch."""
    test = scripted.data().test
    pairs = zip(test.images(torch.arange(90)), test.labels, strict=True)
    truth = {image.numpy().tobytes(): int(label) for image, label in pairs}
    seen = []

    def call(images: np.ndarray) -> np.ndarray:
        seen.append(len(images))
        return np.stack([np.eye(3)[truth[image.tobytes()]] for image in images])

    assert accuracy_of(call, test, 64) == 1.0
    assert seen == [128]


def test_large_images_are_judged_few_at_a_time() -> None:
    """256 of 512 x 512 with their outputs for 21 classes would take 12 GB."""
    pixels = torch.zeros(1, 1, 1, 1, dtype=torch.uint8)
    split = ArraySplit(pixels.expand(20, 3, 512, 512), torch.zeros(20).long())
    seen = []

    def call(images: np.ndarray) -> np.ndarray:
        seen.append(len(images))
        return np.eye(3)[np.zeros(len(images), int)]

    assert accuracy_of(call, split, 1) == 1.0
    assert seen == [9, 9, 2]
    assert at_a_time(split, 4) == 8
    assert at_a_time(split, 16) == 16
    assert at_a_time(scripted.data().test, 1) == 256


def test_its_accuracy_is_that_of_its_engine(compared: Path) -> None:
    """Recomputed with ONNX Runtime alone, image by image."""
    import onnxruntime

    test = scripted.data().test
    engine = compared / "alternatives" / "int8" / "engine.onnx"
    session = onnxruntime.InferenceSession(engine, providers=["CPUExecutionProvider"])
    images = test.images(torch.arange(len(test)))
    logits = [session.run(None, {"images": image[None].numpy()})[0] for image in images]
    right = [int(out.argmax()) == int(label) for out, label in zip(logits, test.labels, strict=True)]
    option = int8(compared / "2x")
    assert option.accuracy == pytest.approx(np.mean(right), abs=1e-6)
    assert (option.accuracy_of, option.engine_bytes) == ("engine", engine.stat().st_size)


def test_it_is_timed_beside_the_engine_that_ships(single: Path, tmp_path: Path) -> None:
    compared = tmp_path / "run"
    shutil.copytree(single, compared)
    shutil.rmtree(compared / "bench")
    again(compared)
    bench = json.loads((compared / "bench" / "bench.json").read_text())
    assert list(bench["alternatives"]) == ["dense", "thin", "int8"]
    dense = scripted.latency((compared / "dense.onnx").read_bytes())
    ratio = dense / scripted.latency((compared / "alternatives" / "int8" / "engine.onnx").read_bytes())
    option = int8(compared)
    assert option.speedup == pytest.approx(ratio, rel=0.01)
    assert option.latency_ms.p50 == pytest.approx(1e3 * dense / ratio, rel=0.05)
    assert option.meets_budget is (ratio >= 2)
    points = load_report(compared / "report.json").accuracy_points or []
    assert [(p.label, p.latency_ms) for p in points if p.kind == "alternative"] == [
        ("dense int8", option.latency_ms.p50)
    ]


def test_an_infeasible_budget_is_told_what_it_reaches(compared: Path) -> None:
    option, found = int8(compared / "50x"), load_report(compared / "50x" / "report.json").alternatives
    assert found is not None
    assert found.dense_latency_ms is not None
    assert found.dense_latency_ms.p50 == pytest.approx(option.latency_ms.p50 * option.speedup, rel=0.02)
    assert load_report(compared / "50x" / "report.json").status == "infeasible"
    assert option.speedup == pytest.approx(int8(compared / "2x").speedup, rel=0.02)
    assert option.meets_budget is False
    assert int8(compared / "5s").meets_budget is True


def test_what_is_not_offered_says_why(compared: Path) -> None:
    found = load_report(compared / "2x" / "report.json").alternatives
    assert found is not None
    assert {o.precision: o.reason for o in found.precisions} == {
        "fp16": "fp16 is not offered on a CPU, which a CPU computes in fp32",
        "int8": None,
    }


def test_nothing_else_of_the_run_is_changed(compared: Path, finished: Path) -> None:
    before, after = (load_report(folder / "2x" / "report.json").to_json() for folder in (finished, compared))
    assert "alternatives" not in before
    for key in ("status", "dense", "pruned", "speedup", "equivalence", "candidates"):
        assert after[key] == before[key], key
    assert int8(compared / "2x").speedup is not None
    for stage in ("dense", "profile", "search", "2x/fit", "2x/finetune", "2x/compile", "2x/bench"):
        assert (finished / stage / "stage.json").read_bytes() == (compared / stage / "stage.json").read_bytes(), stage


def test_one_that_cannot_be_built_fails_nothing(single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    shutil.copytree(single, folder)
    real = scripted.Scripted.compile

    def compile_(self: scripted.Scripted, source: CompileInput, target: Target) -> Engine:
        if target.precision == "int8":
            raise BadInput("int8: the graph cannot be quantised")
        return real(self, source, target)

    monkeypatch.setattr(scripted.Scripted, "compile", compile_)
    (report,) = again(folder)
    assert report.status == "within_budget"
    assert int8(folder).reason == "int8: the graph cannot be quantised"
    assert report.dense.latency_ms is not None


def test_a_comparison_of_methods_does_without(tmp_path: Path) -> None:
    """It would pay for them in each of its runs; and rows of earlier comparisons stay comparable."""

    def plan(**more: Any) -> Plan:
        config = make_config({"model": "resnet20", "data": "fashion-mnist", **more})
        return Plan(config, arms_of(["l1"]), (0,), tmp_path, RowFile(tmp_path / "rows.json"))

    assert plan().settings() == plan(alternatives=False).settings()
    assert plan().arm_config(plan().arms[0], 0).alternatives is False
