"""How many images the proof of a lower precision is judged on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from passdeploy.stages.compile import judged_agreement
from tests import scripted


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
