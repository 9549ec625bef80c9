"""`compile --masked`: the masked network as an engine of its own, proven and timed beside the dense and thin ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import yaml

from passdeploy import masked
from passdeploy.api import run_stage
from passdeploy.engines.files import load_engine
from passdeploy.errors import NotEquivalent
from passdeploy.export import export_program
from passdeploy.reporting import load_report
from tests import scripted

pytestmark = pytest.mark.usefixtures("exported_once")


@pytest.fixture
def folder(copied: Callable[[], Path]) -> Path:
    return copied()


def test_dense_masked_and_thin_stand_side_by_side(folder: Path) -> None:
    (out,) = run_stage("compile", folder, quiet=True, masked=True)
    assert out == folder / "masked"
    facts = json.loads((out / "masked.json").read_text())
    assert facts["difference"] <= 1e-4
    assert facts["engines_compared"] and not facts["kernel"]
    engine = load_engine(out / "engine")
    assert scripted.latency(engine.data) == pytest.approx(scripted.latency((out / "masked.onnx").read_bytes()))
    kinds = [node.op_type for node in onnx.load(str(out / "masked.onnx")).graph.node]
    dense = [node.op_type for node in onnx.load(str(folder / "dense.onnx")).graph.node]
    assert kinds.count("Conv") == dense.count("Conv")
    report = load_report(folder)
    assert report.masked is not None and report.masked.thin_speedup is not None
    assert report.masked.speedup == pytest.approx(1.0, abs=0.05), "masks alone save nothing"
    assert report.masked.thin_speedup > 1.5
    for page in ("report.md", "report.html"):
        text = (folder / page).read_text()
        assert "Masked is not thin" in text and "only surgery turns masks into time" in text
    facts["speedup"]["masked"]["high"] = None  # too few blocks for one
    (out / "masked.json").write_text(json.dumps(facts))
    masked.attach(folder)
    report = load_report(folder)
    assert report.masked is not None and report.masked.speedup_ci95 is None and report.masked.speedup is not None


@pytest.mark.parametrize("by_kernel", [False, True])
def test_the_kernel_is_in_a_program_where_the_backend_masks_by_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, by_kernel: bool
) -> None:
    programs: list[list[str]] = []

    def exported(model: torch.nn.Module, images: np.ndarray) -> None:
        program = export_program(model, images)
        programs.append([name for node in program.graph.nodes if (name := str(node.target)).startswith("passdeploy.")])

    monkeypatch.setattr(masked, "export_program", exported)
    monkeypatch.setattr(scripted.Scripted, "wants_program", True)
    monkeypatch.setattr(scripted.Scripted, "masks_by_kernel", lambda *_: by_kernel)
    (out,) = run_stage("compile", folder, quiet=True, masked=True)
    assert [bool(operators) for operators in programs] == [by_kernel, False], "masked, thin"
    assert json.loads((out / "masked.json").read_text())["kernel"] is by_kernel


def test_the_section_stays_while_its_structure_and_engine_do(folder: Path) -> None:
    run_stage("compile", folder, quiet=True, masked=True)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    scripted.run(folder, weights=config["weights"])
    assert load_report(folder).masked is not None, "published again, nothing had changed"
    facts = json.loads((folder / "masked" / "masked.json").read_text())
    for part in ("structure", "engine"):
        changed = facts | {"of": facts["of"] | {part: "another"}}
        (folder / "masked" / "masked.json").write_text(json.dumps(changed))
        scripted.run(folder, weights=config["weights"])
        assert load_report(folder).masked is None, part
    (folder / "masked" / "masked.json").write_text(json.dumps(facts))
    scripted.run(folder, weights=config["weights"])
    assert load_report(folder).masked is not None


def test_a_masked_engine_that_computes_something_else_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (folder / "report.json").read_bytes()
    made = masked.masked_network

    def broken(*given: object, **named: object) -> torch.nn.Module:
        network: torch.nn.Module = made(*given, **named)  # type: ignore[arg-type]
        with torch.no_grad():
            next(p for p in network.parameters() if p.dim() == 4).mul_(1.5)
        return network

    monkeypatch.setattr(masked, "masked_network", broken)
    with pytest.raises(NotEquivalent, match="differs from the thin one"):
        run_stage("compile", folder, quiet=True, masked=True)
    assert not (folder / "masked" / "masked.json").exists()
    assert (folder / "report.json").read_bytes() == before
