from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from jsonschema import Draft202012Validator

from passdeploy.engines.base import CompileInput
from passdeploy.engines.onnxruntime import OnnxRuntime
from passdeploy.errors import BadInput
from passdeploy.shipping import manifest as m
from passdeploy.shipping import sbom
from passdeploy.shipping.bundle import BundleSource, EngineSource, write_bundle
from passdeploy.shipping.contents import open_bundle
from passdeploy.shipping.sums import digest_file
from tests.shipping.conftest import CLASSES, cpu_target, make_source, report


def test_manifest_is_valid_against_the_published_schema(sealed_bundle: Path) -> None:
    schema = json.loads(m.SCHEMA_FILE.read_text())
    assert schema == m.json_schema(), "run python -m passdeploy.shipping.manifest"
    Draft202012Validator.check_schema(schema)
    manifest = json.loads((sealed_bundle / "bundle.json").read_text())
    Draft202012Validator(schema).validate(manifest)
    assert m.read((sealed_bundle / "bundle.json").read_bytes()).to_json() == (sealed_bundle / "bundle.json").read_text()


def test_engines_are_bound_to_the_onnx_file(sealed_bundle: Path, source: BundleSource) -> None:
    contents = open_bundle(sealed_bundle)
    (engine,) = contents.engines
    assert engine.onnx_sha256 == digest_file(sealed_bundle / "model.onnx") == digest_file(source.onnx)
    assert engine.sha256 == digest_file(sealed_bundle / engine.file)
    compiled = source.engines[0].folder / "engine.onnx"
    assert (sealed_bundle / engine.file).read_bytes() == compiled.read_bytes(), "what was measured is what is shipped"
    assert contents.classes == CLASSES
    entry = contents.manifest["engines"][0]
    assert entry["latency_ms"]["p50"] == 1.5
    assert entry["dense_latency_ms"]["p50"] == 3.0


def test_samples_are_the_graphs_outputs(sealed_bundle: Path, source: BundleSource) -> None:
    import onnxruntime as ort

    images, outputs = open_bundle(sealed_bundle).samples()
    assert np.array_equal(images, source.images)
    session = ort.InferenceSession(str(source.onnx), providers=["CPUExecutionProvider"])
    expected = np.concatenate([session.run(None, {"images": image[None]})[0] for image in images])
    assert np.max(np.abs(outputs - expected)) <= 1e-5 * np.max(np.abs(expected))


def test_the_card_says_what_matters(sealed_bundle: Path) -> None:
    card = (sealed_bundle / "MODEL_CARD.md").read_text()
    assert "the EXIF orientation was applied" in card
    for part in (
        "within_budget",
        "92.50 %",
        "93.00 %",
        "p50 1.500 ms",
        "cat, dog",
        "tampering",
        "masked vs thin 1.0e-06",
    ):
        assert part in card


def test_the_card_of_a_dense_network_that_was_fast_enough_does_not_call_it_pruned(tmp_path: Path) -> None:
    """Nothing in a bundle tells it from a pruned one, so that every card has to be true of both."""
    same = {"accuracy": 0.93, "macs": 1e6, "params": 1e4, "latency_ms": report()["dense"]["latency_ms"]}  # type: ignore[index]
    source = make_source(tmp_path / "run", report=report(dense=same, pruned=same))
    card = (write_bundle(tmp_path / "bundle", source) / "MODEL_CARD.md").read_text()
    assert "pruned" not in card
    assert "small, made to meet a latency on real hardware" in card


def test_markup_in_names_stays_text(tmp_path: Path) -> None:
    source = make_source(tmp_path / "run", data="<script>|x|", classes=("a|b", "`c`", "<d>", "e", "f"))
    card = (write_bundle(tmp_path / "bundle", source) / "MODEL_CARD.md").read_text()
    assert "<script>" not in card
    assert "a\\|b" in card


def test_sbom_lists_model_engine_and_libraries(sealed_bundle: Path) -> None:
    document = json.loads((sealed_bundle / "sbom.cdx.json").read_text())
    components = {c["name"]: c for c in document["components"]}
    onnx = components["model.onnx"]
    assert onnx["type"] == "machine-learning-model"
    assert onnx["hashes"] == [{"alg": "SHA-256", "content": digest_file(sealed_bundle / "model.onnx")}]
    assert components["onnxruntime"]["purl"].startswith("pkg:pypi/onnxruntime@")
    assert components["onnxruntime"]["scope"] == "required"
    references = [c["bom-ref"] for c in document["components"]]
    assert len(references) == len(set(references))


@pytest.mark.parametrize(
    ("installed", "backend", "named"),
    [
        ("onnxruntime", "onnxruntime", "onnxruntime"),
        ("onnxruntime-gpu", "onnxruntime", "onnxruntime-gpu"),
        ("onnxruntime-gpu", "onnxruntime_tensorrt", "onnxruntime-gpu"),
        ("onnxruntime", "openvino", "openvino"),
    ],
)
def test_sbom_names_the_distribution_that_the_engine_runs_on(
    installed: str, backend: str, named: str, sealed_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sbom, "_installed", lambda name: "1.0" if name == installed else None)
    manifest = m.read((sealed_bundle / "bundle.json").read_bytes())
    (engine,) = manifest.engines
    other = manifest.model_copy(update={"engines": (engine.model_copy(update={"backend": backend}),)})
    components = json.loads(sbom.sbom(other, {}))["components"]
    assert {c["name"] for c in components if c.get("scope") == "required"} == {named, "passdeploy"}


def test_sbom_names_what_runs_an_engine_beside_its_backend(sealed_bundle: Path) -> None:
    manifest = m.read((sealed_bundle / "bundle.json").read_bytes())
    (engine,) = manifest.engines
    made = engine.model_copy(update={"backend": "tensorrt_rtx", "backend_version": "1.7.1.116"})
    document = sbom.sbom(manifest.model_copy(update={"engines": (made,)}), {"cuda-bindings": "13.0.2"})
    components = {c["name"]: c for c in json.loads(document)["components"]}
    for name, version in (("tensorrt-rtx-cu13", "1.7.1.116"), ("cuda-bindings", "13.0.2")):
        assert (components[name]["version"], components[name]["scope"]) == (version, "required")


def test_without_engines_or_measurements_it_claims_nothing(tmp_path: Path) -> None:
    source = make_source(tmp_path / "run", engines=(), report=report(status="unverified"))
    folder = write_bundle(tmp_path / "bundle", source)
    card = (folder / "MODEL_CARD.md").read_text()
    assert "nothing was measured" in card
    assert "attached" not in card, "a GPU may be, and what runs its engines be missing"
    assert open_bundle(folder).engines == ()


def test_a_target_that_is_not_attached_gets_no_latency(tmp_path: Path) -> None:
    source = make_source(tmp_path / "run")
    target = cpu_target().with_(attached=False)
    engines = (EngineSource(source.engines[0].folder, target),)
    folder = write_bundle(tmp_path / "bundle", make_source(tmp_path / "run", engines=engines))
    assert open_bundle(folder).manifest["engines"][0]["latency_ms"] is None


def test_a_card_claims_no_budget_that_was_not_measured(tmp_path: Path) -> None:
    """A target that is not attached, and an accuracy below what was asked for."""
    source = make_source(tmp_path / "run", report=report(status="accuracy_below_floor"))
    folder = write_bundle(tmp_path / "bundle", source)
    assert "meets the budget" not in (folder / "MODEL_CARD.md").read_text()


def test_replaces_a_bundle_as_a_whole_and_nothing_else(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "bundle", make_source(tmp_path / "run"))
    first = open_bundle(folder).sealed.root
    write_bundle(folder, make_source(tmp_path / "run", seed=5))
    assert open_bundle(folder).sealed.root != first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "run"]
    other = tmp_path / "mine"
    other.mkdir()
    (other / "thesis.tex").write_text("x")
    with pytest.raises(BadInput, match="is no bundle"):
        write_bundle(other, make_source(tmp_path / "run"))
    assert (other / "thesis.tex").read_text() == "x"


def test_a_failed_write_leaves_the_old_bundle(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "bundle", make_source(tmp_path / "run"))
    before = open_bundle(folder).sealed.root
    broken = make_source(tmp_path / "run", config=tmp_path / "missing.yaml")
    with pytest.raises(BadInput, match=r"missing\.yaml"):
        write_bundle(folder, broken)
    assert open_bundle(folder).sealed.root == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "run"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": np.zeros((2, 3, 5, 5), np.float32)}, "sample images"),
        ({"outputs": np.full((4, 5), np.nan, np.float32)}, "not finite"),
        ({"outputs": np.zeros((1, 5), np.float32)}, "one row per"),
    ],
)
def test_bad_sources_are_refused_in_one_line(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(BadInput, match=message) as error:
        write_bundle(tmp_path / "bundle", make_source(tmp_path / "run", **changes))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "bundle").exists()


def test_calibration_images_are_recorded_by_digest(tmp_path: Path) -> None:
    digests = []
    for images in (np.zeros((2, 3, 12, 10), np.float32), np.ones((2, 3, 12, 10), np.float32)):
        source = make_source(tmp_path / "run")
        engines = (EngineSource(source.engines[0].folder, cpu_target(), calibration=images),)
        folder = write_bundle(tmp_path / "bundle", make_source(tmp_path / "run", engines=engines))
        digests.append(open_bundle(folder).manifest["engines"][0]["calibration_sha256"])
    assert all(digests)
    assert digests[0] != digests[1]


def test_an_engine_in_int8_says_which_images_calibrated_it(tmp_path: Path) -> None:
    """Of 7 images, 6: those that fill the batches of 3."""
    source, target = make_source(tmp_path / "run", batch=3), replace(cpu_target(3), precision="int8")
    images = np.random.default_rng(0).random((7, 3, 12, 10), dtype=np.float32)
    OnnxRuntime().save(OnnxRuntime().compile(CompileInput(source.onnx, samples=images), target), tmp_path / "int8")
    recorded = []
    for calibration in (None, images[:6], images):
        engines = (EngineSource(tmp_path / "int8", target, calibration=calibration),)
        folder = write_bundle(tmp_path / "bundle", replace(source, engines=engines))
        recorded.append(open_bundle(folder).manifest["engines"][0]["calibration_sha256"])
    assert recorded[0] == recorded[1] != recorded[2]
