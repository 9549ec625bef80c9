"""How many images the proof of a lower precision is judged on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from passdeploy.reporting import load_report
from passdeploy.reporting.verdict import verdict
from passdeploy.stages import accuracy
from passdeploy.stages.compile import judged_agreement
from tests import scripted

pytestmark = pytest.mark.usefixtures("exported_once")


@pytest.mark.parametrize("batch", [1, 48])
def test_agreement_is_judged_on_a_thousand_images(tmp_path: Path, batch: int) -> None:
    """Of 1500 images the engine gets every 20th wrong; a multiple of the batch it is asked at a time."""
    run = scripted.start(tmp_path / "run", batch=batch, precision="int8")
    run.subject.data.val = val = scripted.stripes(1500, 5)
    val.pixels[:, 0, 0, 0] = 0
    val.pixels[::20, 0, 0, 0] = 255

    def graph(images: np.ndarray) -> np.ndarray:
        assert len(images) % batch == 0
        return np.tile(np.array([0.0, 1.0, 0.0]), (len(images), 1))

    def engine(images: np.ndarray) -> np.ndarray:
        outputs = graph(images)
        outputs[images[:, 0, 0, 0] == 1, 2] = 2
        return outputs

    found = judged_agreement(run, engine, graph)
    assert found["agreement_images"] == 1000
    assert found["top1_agreement"] == pytest.approx(0.95, abs=0.02)


def test_all_of_a_small_split_are_taken(single: Path, tmp_path: Path) -> None:
    weights = str(single / "dense" / "dense.safetensors")
    run = scripted.start(tmp_path / "run", precision="int8", weights=weights, latency="5s")
    run.slicer = scripted.slicer(run)  # type: ignore[misc]
    run.run_until("compile")
    proof = json.loads((tmp_path / "run" / "compile" / "proof.json").read_text())
    assert (proof["images"], proof["agreement_images"]) == (64, len(run.subject.data.val))
    in_fp32 = json.loads((single / "compile" / "proof.json").read_text())
    assert in_fp32["agreement_images"] == in_fp32["images"] == 64


def test_a_floor_is_held_against_the_engine_that_ships(
    single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network in fp32 keeps it, its int8 engine does not."""
    weights = str(single / "dense" / "dense.safetensors")
    run = scripted.start(tmp_path / "run", precision="int8", weights=weights, latency="1x", min_accuracy=0.5)
    run.slicer = scripted.slicer(run)  # type: ignore[misc]
    real, judged = accuracy.judge, []

    def judge(call: Any, split: Any, *arguments: Any) -> Any:
        judged.append("validation" if split is run.subject.data.val else "test")
        return 0.25 if judged[-1] == "validation" else real(call, split, *arguments)

    monkeypatch.setattr(accuracy, "judge", judge)
    (report,) = run.run()
    assert judged == ["test", "validation", "test"], "of the dense engine, nothing is decided"
    facts = json.loads((tmp_path / "run" / "finetune" / "finetune.json").read_text())
    assert facts["accuracy"]["validation"] > 0.5
    assert report.status == "accuracy_below_floor"
    assert report.budget.judged_accuracy == 0.25
    assert "on validation images is 25.00 %, below the 50.00 %" in verdict(report).detail
    assert load_report(tmp_path / "run" / "report.json").status == report.status
