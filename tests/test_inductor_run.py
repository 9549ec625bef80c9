"""A whole run on inductor: native packages are proven, measured, reported, bundled and loaded again from the bundle.

Steered by multiply-adds, so that two packages are compiled and not dozens; that structures are measured on inductor,
too, is `test_meter`'s.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from passdeploy import rebuilds
from passdeploy.engines.base import get_backend
from passdeploy.shipping.verify import verify
from passdeploy.targets import resolve
from tests import scripted

REASON = get_backend("inductor").available(resolve("cpu"))
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"inductor: {REASON}")


@pytest.fixture(scope="module")
def shipped(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("inductor") / "run"
    quick = {"dense": {"epochs": 1, "min_steps": 10}, "search": {"min_steps": 16}, "finetune": {"min_steps": 8}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rebuilds, "TIMES", 2)  # a build takes as long as everything else in a test of the other backends
        (report,) = scripted.run(out, backend="inductor", axis="macs", method="l1", epochs=0.5, **quick)
    assert report.target.backend == "inductor"
    return out


def test_proofs_and_measurements(shipped: Path) -> None:
    report = json.loads((shipped / "report.json").read_text())
    assert report["status"] in ("within_budget", "over_budget"), "two thousandths of a second decide: either is fine"
    proof = report["equivalence"]
    for step in ("masked_vs_thin", "thin_vs_onnx", "onnx_vs_engine"):
        assert 0 <= proof[step] <= 1e-4
    assert proof["top1_agreement"] == 1
    assert report["speedup"]["macs"] >= 2
    assert report["dense"]["latency_ms"]["p50"] > 0 < report["pruned"]["latency_ms"]["p50"]


def test_the_package_that_was_measured_is_the_one_in_the_bundle(shipped: Path) -> None:
    measured = (shipped / "engine" / "engine.pt2").read_bytes()
    (inside,) = (shipped / "bundle" / "engines").glob("*/engine.pt2")
    assert hashlib.sha256(inside.read_bytes()).digest() == hashlib.sha256(measured).digest()
    result = verify(shipped / "bundle")
    assert result.ok, result.reason


def test_the_bundle_computes_what_was_proven(shipped: Path) -> None:
    from passdeploy.shipping.runner import load

    samples = shipped / "bundle" / "samples"
    images, expected = np.load(samples / "images.npy"), np.load(samples / "outputs.npy")
    with load(shipped / "bundle") as model:
        assert np.abs(model.run(images) - expected).max() <= 1e-4 * np.abs(expected).max()
