"""The whole pipeline, with an engine of scripted latency: what it decides, what it leaves behind, what it keeps."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
import yaml
from torch import nn

from passdeploy import dependencies
from passdeploy.assemble import assemble
from passdeploy.budget import parse_budget
from passdeploy.cli.running import exit_code
from passdeploy.console import Ui
from passdeploy.engines.base import Engine
from passdeploy.errors import BadInput, PassdeployError
from passdeploy.latency import measure
from passdeploy.latency.candidates import Candidate, FitResult
from passdeploy.latency.measure import interleave
from passdeploy.meter import Meter
from passdeploy.pipeline import Run
from passdeploy.reporting import load_report
from passdeploy.reporting.schema import Report
from passdeploy.reporting.verdict import verdict
from passdeploy.stages import PER_BUDGET, SHARED, common, fit
from passdeploy.stages import compile as compile_stage
from passdeploy.stages.proof import UNBOUNDED
from passdeploy.structure import Structure
from passdeploy.workspace import Workspace
from tests import scripted
from tests.latency.scripted import FakeClock, ScriptedRunner

STAGES = ("dense", "profile", "search", "fit", "finetune", "compile", "bench", "report", "ship")
FINAL = (
    "structure.json",
    "prompt.safetensors",
    "model.safetensors",
    "architecture.json",
    "model.onnx",
    "engine",
    "measurements.csv",
    "report.json",
    "report.md",
    "report.html",
    "bundle",
)
"""What the design promises in a run directory besides config.yaml, manifest.json and dense.onnx."""


def report(folder: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return data


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def weights(single: Path) -> str:
    return str(yaml.safe_load((single / "config.yaml").read_text())["weights"])


def again(folder: Path, **changes: Any) -> list[Any]:
    """Continues a copied run; `changes` are written into its configuration first, as if it had been begun so."""
    path = folder / "config.yaml"
    config = yaml.safe_load(path.read_text()) | changes
    path.write_text(yaml.safe_dump(config))
    return scripted.run(folder, weights=config["weights"], **changes)


# --- what lies there afterwards ------------------------------------------------------------------------------------


def test_all_promised_files(single: Path) -> None:
    for name in (*FINAL, "config.yaml", "manifest.json", "dense.onnx"):
        assert (single / name).exists(), name
    assert set(json.loads((single / "manifest.json").read_text())["stages"]) == set(STAGES)
    for stage in STAGES:
        record = json.loads((single / stage / "stage.json").read_text())
        for name, expected in record["outputs"].items():
            assert digest(single / stage / name) == expected
    partial = single / ".partial"
    assert not partial.exists() or not any(partial.iterdir())
    assert not list(single.rglob("*.tmp"))
    assert not list(single.rglob("*.ckpt"))


def test_a_bundle_carries_the_dense_graph_when_its_budget_is_a_speedup(finished: Path) -> None:
    """Where it arrives, `verify --measure` has to judge the speed-up again."""
    held = {
        name: json.loads((finished / name / "bundle" / "bundle.json").read_text())["parts"] for name in ("2x", "5s")
    }
    assert held["2x"]["dense_onnx"]["sha256"] == digest(finished / "dense.onnx")
    assert held["5s"]["dense_onnx"] is None


def test_each_budget_has_its_own_folder(finished: Path) -> None:
    for name in FINAL:
        assert (finished / "2x" / name).exists(), name
        assert not (finished / name).exists(), name
    assert (finished / "dense.onnx").exists()
    for stage in ("dense", "profile", "search"):
        assert (finished / stage / "stage.json").exists()
        assert not (finished / "2x" / stage).exists()


def test_reports_validate(finished: Path, single: Path) -> None:
    schema = json.loads(resources.files("passdeploy.reporting").joinpath("report.schema.json").read_text())
    for folder in (single, finished / "2x", finished / "50x", finished / "5s"):
        jsonschema.Draft202012Validator(schema).validate(report(folder))


def test_the_engine_shipped_is_the_one_measured(single: Path) -> None:
    shipped = digest(single / "engine" / "engine.onnx")
    assert shipped == digest(single / "compile" / "engine" / "engine.onnx")
    assert [digest(path) for path in (single / "bundle" / "engines").rglob("engine.onnx")] == [shipped]
    assert report(single)["provenance"]["engine_sha256"] == shipped
    assert shipped in scripted.LOADED


# --- what it decides -----------------------------------------------------------------------------------------------


def test_within_budget(single: Path) -> None:
    got = report(single)
    assert got["status"] == "within_budget"
    assert exit_code([load_report(single / "report.json")], require_measured=True) == 0
    assert got["speedup"]["latency"] >= 2
    assert got["pruned"]["macs"] < got["dense"]["macs"]
    # The script's latency of the very files, without noise.
    ratio = scripted.latency((single / "dense.onnx").read_bytes()) / scripted.latency(
        (single / "engine" / "engine.onnx").read_bytes()
    )
    assert got["speedup"]["latency"] == pytest.approx(ratio, rel=0.01)
    for step in ("masked_vs_thin", "thin_vs_onnx", "onnx_vs_engine"):
        assert got["equivalence"][step] <= 1e-4
    assert got["equivalence"]["top1_agreement"] == 1.0
    assert got["budget"]["latency_ms"] == got["dense"]["latency_ms"]["p50"] / 2
    assert got["predictor"]["kind"] == "measured"
    assert got["predictor"]["mape"] < 0.05


def test_the_report_says_where_the_time_goes(single: Path) -> None:
    got = report(single)
    dense, thin = (scripted.latency((single / name).read_bytes()) for name in ("dense.onnx", "model.onnx"))
    named = [part for part in got["layers"] if part["name"].startswith("layer")]
    assert sum(part["dense_ms"] for part in named) == pytest.approx(1e3 * dense)
    assert sum(part["pruned_ms"] for part in named) == pytest.approx(1e3 * thin)
    for page in ("report.html", "report.md"):
        assert "Where the time goes" in (single / page).read_text()


def test_six_processes_agree_on_a_scripted_latency(single: Path) -> None:
    ratio = report(single)["speedup"]
    assert len(ratio["processes"]) == 6
    assert ratio["latency_ci95"] == [min(ratio["processes"]), max(ratio["processes"])]


def test_the_accuracies_are_those_of_the_files(single: Path) -> None:
    """Recomputed with ONNX Runtime alone, on pixels in [0, 1]: normalisation and prompt are inside the graph."""
    import onnxruntime

    test = scripted.data().test
    images = test.images(torch.arange(len(test)))
    for name, file in (("dense", "dense.onnx"), ("pruned", "model.onnx")):
        session = onnxruntime.InferenceSession(single / file, providers=["CPUExecutionProvider"])
        logits = [session.run(None, {"images": image[None].numpy()})[0] for image in images]
        right = [int(out.argmax()) == int(label) for out, label in zip(logits, test.labels, strict=True)]
        assert report(single)[name]["accuracy"] == pytest.approx(sum(right) / len(right), abs=1e-6)


def test_infeasible(finished: Path) -> None:
    folder = finished / "50x"
    got = report(folder)
    assert got["status"] == "infeasible"
    assert exit_code([load_report(folder / "report.json")], require_measured=False) == 1
    assert got["reachable"]["measured"]
    assert 1 < got["reachable"]["speedup"] < 50
    assert any("No structure reaches 50x" in message for message in got["messages"])
    assert got["pruned"] is None
    assert not (folder / "bundle").exists()
    assert not (folder / "engine").exists()


def test_a_dense_engine_inside_the_budget_is_shipped_as_it_is(finished: Path) -> None:
    folder = finished / "5s"
    got = report(folder)
    assert got["status"] == "within_budget"
    assert any("already inside the budget" in message for message in got["messages"])
    assert got["pruned"]["macs"] == got["dense"]["macs"]
    assert got["pruned"]["accuracy"] == got["dense"]["accuracy"]
    assert not (folder / "prompt.safetensors").exists()
    from safetensors.torch import load_file

    shipped, dense = load_file(folder / "model.safetensors"), load_file(finished / "dense" / "dense.safetensors")
    assert all(torch.equal(shipped[name], dense[name]) for name in dense)


def test_the_worst_of_several_budgets_decides(finished: Path) -> None:
    reports = [load_report(finished / name / "report.json") for name in ("2x", "5s")]
    assert exit_code(reports, require_measured=False) == 0
    reports.append(load_report(finished / "50x" / "report.json"))
    assert exit_code(reports, require_measured=False) == 1


def test_over_budget(copied: Callable[[], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the loop measured does not hold when the engine that ships is measured."""
    folder = copied()
    shutil.rmtree(folder / "bench")
    real = scripted.latency
    thin = digest(folder / "engine" / "engine.onnx")
    monkeypatch.setattr(
        scripted, "latency", lambda data: real(data) * (1.4 if hashlib.sha256(data).hexdigest() == thin else 1)
    )
    (got,) = again(folder)
    assert got.status == "over_budget"
    assert exit_code([got], require_measured=False) == 1


def test_accuracy_below_the_floor(copied: Callable[[], Path]) -> None:
    folder = copied()
    (got,) = again(folder, min_accuracy=0.999)
    assert got.status == "accuracy_below_floor"
    tuned = json.loads((folder / "finetune" / "finetune.json").read_text())["accuracy"]
    assert got.budget.judged_accuracy == tuned["validation"] != tuned["test"]
    assert f"on validation images is {100 * tuned['validation']:.2f} %" in verdict(got).detail
    assert exit_code([got], require_measured=False) == 1
    assert got.speedup.latency is not None
    assert got.speedup.latency >= 2


@pytest.fixture(scope="module")
def unattached(one_thread: None, finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("tensorrt_rtx", reason="pip install passdeploy[rtx]")
    from passdeploy.targets import DEVICES, attached_device

    if attached_device(DEVICES["a100"]):
        pytest.skip("this machine has an A100")
    out = tmp_path_factory.mktemp("runs") / "a100"
    given = str(finished / "dense" / "dense.safetensors")
    running = scripted.start(
        out, weights=given, target="a100", backend="tensorrt_rtx", latency="1.2x,1ns", alternatives=True
    )
    running.run()
    return out


def test_unverified(unattached: Path) -> None:
    folder = unattached / "1.2x"
    got = load_report(folder / "report.json")
    assert got.status == "unverified"
    assert not got.target.attached
    assert got.target.compute_capability == "8.0"
    assert exit_code([got], require_measured=False) == 0
    assert exit_code([got], require_measured=True) == 1
    assert got.speedup.latency is None
    assert got.dense.latency_ms is None
    assert got.predictor is not None
    assert got.predictor.kind == "analytic"
    assert got.predicted is not None
    assert got.equivalence.onnx_vs_engine is None
    assert any("nothing was measured" in message for message in got.messages or [])
    facts = json.loads((folder / "engine" / "engine.json").read_text())
    assert facts["backend"] == "tensorrt_rtx"
    engine = folder / "engine" / facts["file"]
    assert digest(engine) == facts["sha256"]
    assert [digest(path) for path in (folder / "bundle" / "engines").rglob(facts["file"])] == [facts["sha256"]]


def test_what_else_could_be_done_is_built_where_it_cannot_be_timed(unattached: Path) -> None:
    """An A100 has no fp8, and fp16 is what the run is in."""
    got = load_report(unattached / "1.2x" / "report.json").alternatives
    assert got is not None
    (option,) = got.precisions
    assert (option.precision, option.reason, option.accuracy_of) == ("int8", None, "graph")
    assert option.latency_ms is option.speedup is option.meets_budget is None
    facts = json.loads((unattached / "alternatives" / "int8" / "engine.json").read_text())
    assert facts["meta"]["precision"] == "int8"
    assert option.engine_bytes == (unattached / "alternatives" / "int8" / facts["file"]).stat().st_size
    assert option.accuracy == pytest.approx(load_report(unattached / "1.2x" / "report.json").dense.accuracy, abs=0.05)


def test_out_of_reach_by_prediction(unattached: Path) -> None:
    got = load_report(unattached / "1ns" / "report.json")
    assert got.status == "infeasible"
    assert got.reachable is not None
    assert not got.reachable.measured
    assert any("predicted" in message for message in got.messages or [])
    assert not (unattached / "1ns" / "bundle").exists()


def test_a_backend_that_cannot_run_engines_says_why(
    copied: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hardware is there: to say that it is not attached would send the user to the wrong place."""
    monkeypatch.setattr(scripted.Scripted, "runnable", lambda *_: "the driver is missing")
    (got,) = again(copied())
    assert (got.status, got.target.attached) == ("unverified", True)
    assert "the driver is missing: nothing was measured, the engine was compiled only." in (got.messages or [])


def test_other_weights_are_trained_anew_where_the_structure_is_the_same(copied: Callable[[], Path]) -> None:
    """Fit says what is kept, and nothing of the weights: those are the search's, or the dense network's."""
    folder = copied()
    run = scripted.start(folder, weights=yaml.safe_load((folder / "config.yaml").read_text())["weights"])
    (budget,) = run.runs
    assert budget.space.current("finetune", run.inputs("finetune", budget))
    real = run.space.digest
    for stage in ("dense", "search"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run.space, "digest", lambda name, stage=stage: "other" if name == stage else real(name))
            assert not budget.space.current("finetune", run.inputs("finetune", budget)), stage


def broken(network: nn.Module) -> nn.Module:
    """A network that computes something else."""
    with torch.no_grad():
        next(m for m in network.modules() if isinstance(m, nn.Linear)).bias += 1  # type: ignore[operator]
    return network


def test_a_surgery_that_changes_the_function_ships_nothing(
    copied: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied()
    shutil.rmtree(folder / "fit")
    real = fit.thin
    monkeypatch.setattr(fit, "thin", lambda *arguments: broken(real(*arguments)))
    (got,) = again(folder)
    assert got.status == "not_equivalent"
    assert got.equivalence.masked_vs_thin is not None
    assert got.equivalence.masked_vs_thin > 1e-4
    assert exit_code([got], require_measured=False) == 1
    # What the good run had left there is not offered any more.
    for name in ("bundle", "engine", "model.onnx", "model.safetensors"):
        assert not (folder / name).exists(), name


def test_an_export_that_changes_the_function_ships_nothing(
    copied: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied()
    shutil.rmtree(folder / "compile")
    real = compile_stage.export_onnx

    def export(model: nn.Module, path: Path, *arguments: Any) -> Path:
        if path.name == "model.onnx":
            import copy

            model = broken(copy.deepcopy(model))
        return real(model, path, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(compile_stage, "export_onnx", export)
    (got,) = again(folder)
    assert got.status == "not_equivalent"
    assert got.equivalence.thin_vs_onnx is not None
    assert got.equivalence.thin_vs_onnx > 1e-4
    for name in ("bundle", "engine", "model.onnx", "measurements.csv"):
        assert not (folder / name).exists(), name
    assert exit_code([got], require_measured=False) == 1
    with pytest.raises(PassdeployError, match="the compiled engine does not compute what the network does"):
        scripted.start(folder, weights=yaml.safe_load((folder / "config.yaml").read_text())["weights"]).run_until(
            "compile"
        )


def test_an_engine_that_returns_no_numbers_is_not_equivalent(
    copied: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied()
    shutil.rmtree(folder / "compile")
    real = scripted.ScriptedRunner.run

    def run(self: scripted.ScriptedRunner, inputs: Any) -> Any:
        return {name: np.full_like(value, np.nan) for name, value in real(self, inputs).items()}

    monkeypatch.setattr(scripted.ScriptedRunner, "run", run)
    (got,) = again(folder)
    assert got.status == "not_equivalent"
    assert got.equivalence.onnx_vs_engine == UNBOUNDED  # null would say that it was not checked
    assert "ONNX = engine" in verdict(got).headline
    assert not (folder / "bundle").exists()


def test_a_thin_network_without_numbers_is_not_equivalent(
    copied: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied()
    shutil.rmtree(folder / "fit")
    real = fit.thin

    def thin(*arguments: Any) -> nn.Module:
        network = real(*arguments)
        with torch.no_grad():
            next(m for m in network.modules() if isinstance(m, nn.Linear)).bias.fill_(float("inf"))
        return network

    monkeypatch.setattr(fit, "thin", thin)
    (got,) = again(folder)
    assert got.status == "not_equivalent"
    assert got.equivalence.masked_vs_thin == UNBOUNDED


def rewrite(folder: Path, name: str, **changes: Any) -> None:
    """Changes a JSON file of a finished stage, as if the stage had found something else."""
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    record = json.loads((folder / "stage.json").read_text())
    record["outputs"][name] = digest(path)
    (folder / "stage.json").write_text(json.dumps(record))


def assembled(folder: Path) -> Report:
    running = scripted.start(folder, weights=weights(folder))
    return assemble(running, running.runs[0])


def test_a_report_tells_nothing_of_stages_that_are_left_out_now(copied: Callable[[], Path]) -> None:
    """They still lie there, from when the budget could be reached."""
    folder = copied()
    reachable = {"latency_ms": 1.0, "speedup": 1.5, "measured": True}
    rewrite(folder / "fit", "fit.json", status="infeasible", reachable=reachable)
    got = assembled(folder)
    assert got.status == "infeasible"
    assert got.dense.latency_ms is got.distribution is got.layers is got.prompt is got.rebuilds is None
    assert got.provenance is not None
    assert got.provenance.engine is got.provenance.engine_sha256 is None
    assert not {"finetune", "compile", "bench"} & set(got.timing_s)


def test_an_engine_that_is_not_equivalent_has_no_speedup(copied: Callable[[], Path]) -> None:
    folder = copied()
    rewrite(folder / "compile", "proof.json", ok=False, top1_agreement=0.5)
    got = assembled(folder)
    assert got.status == "not_equivalent"
    assert got.speedup.latency is got.dense.latency_ms is got.distribution is None
    assert got.equivalence.top1_agreement == 0.5
    assert "bench" not in got.timing_s


@pytest.mark.parametrize("percentile", ["p50", "p90", "p99"])
@pytest.mark.parametrize("seconds", [0.02, 0.15])
def test_every_percentile_gets_the_samples_it_needs(percentile: str, seconds: float) -> None:
    clock = FakeClock()
    slow = {"dense": ScriptedRunner(clock, 2 * seconds), "thin": ScriptedRunner(clock, seconds)}
    settings = common.bench_settings(parse_budget("30ms", percentile))
    value = interleave(slow, settings, clock=clock).measurements["thin"].at(float(percentile[1:]))
    assert value == pytest.approx(1000 * seconds)


def test_a_percentile_that_no_patience_can_measure_is_refused(
    single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three of four attempts at a p99 budget would otherwise end as infeasible, for want of samples."""

    def searched() -> None:
        run = scripted.start(tmp_path / "run", latency="0.1ms", percentile="p99", weights=weights(single))
        run.slicer = scripted.slicer(run)  # type: ignore[misc]
        run.run_until("search")

    with monkeypatch.context() as patch:
        patch.setattr(measure, "PATIENCE", 0)
        patch.setattr(common, "BENCH", dataclasses.replace(common.BENCH, max_s=1e-9))
        with pytest.raises(BadInput, match="p99: an inference takes too long to time the 662 that it needs"):
            searched()
    searched()  # once the machine is quiet, or the network another one: nothing of it was kept


def test_a_speed_up_does_not_wait_for_samples_that_decide_nothing() -> None:
    clock = FakeClock()
    slow = {"dense": ScriptedRunner(clock, 0.04), "thin": ScriptedRunner(clock, 0.02)}
    found = interleave(slow, common.fit_settings(parse_budget("2x", "p99")), clock=clock)
    assert found.measurements["thin"].blocks == common.PAIRS and found.measurements["thin"].at(99) is None
    assert common.fit_settings(parse_budget("5ms", "p99")) == common.bench_settings(parse_budget("5ms", "p99"))


def test_what_does_not_compile_is_left_out_and_named(
    copied: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied()
    chosen = json.loads((folder / "structure.json").read_text())
    shutil.rmtree(folder / "fit")
    compiled = Meter._compiled

    def refusing(self: Meter, structure: Structure) -> Engine:
        if self.groups.canonical(structure).to_json() == chosen:
            raise BadInput("engine: no kernel for this")
        return compiled(self, structure)

    shown: list[str] = []
    monkeypatch.setattr(Meter, "_compiled", refusing)
    monkeypatch.setattr(Ui, "step", lambda self, done, total, state="": shown.append(state))
    run = scripted.start(folder, weights=weights(folder))
    run.slicer = scripted.slicer(run)  # type: ignore[misc]
    run.run_until("fit")
    facts = json.loads((folder / "fit" / "fit.json").read_text())
    assert facts["status"] == "within_budget"
    assert any("left out that can't be measured: engine: no kernel for this" in said for said in facts["messages"])
    assert any("remove fit/measurements.jsonl" in said for said in facts["messages"])
    assert [c["chosen"] for c in facts["candidates"] if c["measured_ratio"] is None] == [False]
    assert shown.count("not measurable") == 1 and "0.000x" not in shown


def test_what_was_measured_once_is_not_discarded_for_a_failure_later(
    copied: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A child that was killed says nothing of the structure: the same command goes on."""
    folder = copied()
    chosen = json.loads((folder / "structure.json").read_text())
    shutil.rmtree(folder / "fit")
    compare, calls = Meter.compare, []

    def killed(self: Meter, structure: Structure, settings: Any) -> Any:
        if self.groups.canonical(structure).to_json() == chosen:
            calls.append(structure)
            if len(calls) == 2:
                raise BadInput("the measuring process was killed")
        return compare(self, structure, settings)

    monkeypatch.setattr(Meter, "compare", killed)
    run = scripted.start(folder, weights=weights(folder))
    run.slicer = scripted.slicer(run)  # type: ignore[misc]
    with pytest.raises(BadInput, match="was killed"):
        run.run_until("fit")
    assert "failed" not in (folder / ".partial" / "fit" / "measurements.jsonl").read_text()
    run.run_until("fit")
    assert json.loads((folder / "fit" / "structure.json").read_text()) == chosen


def test_the_fastest_is_that_of_those_that_can_be_measured(
    copied: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied()
    shutil.rmtree(folder / "fit")
    slow = FitResult(Candidate(Structure({}), 1.0, 1.0, [fit._Timed(1.5, 1.4, 1.0, 1.5)], parse_budget("2x")), False)

    def loop(allocate: Any, fastest: Any, measure: Any, *_: Any) -> FitResult:
        slow.chosen.structure, _predicted = fastest()
        measure(slow.chosen.structure)
        return slow

    def refusing(*_: Any) -> Any:
        raise BadInput("engine: no kernel for this")

    monkeypatch.setattr("passdeploy.stages.fit.close_loop", loop)
    monkeypatch.setattr(Meter, "compare", refusing)
    run = scripted.start(folder, weights=weights(folder))
    run.slicer = scripted.slicer(run)  # type: ignore[misc]
    run.run_until("fit")
    facts = json.loads((folder / "fit" / "fit.json").read_text())
    assert any("the fastest that can be measured is measured at 1 ms, 1.50x" in said for said in facts["messages"])


@pytest.mark.parametrize(("speedup", "unsteady"), [(2.03, True), (1.9, False)])
def test_what_is_fast_enough_once_only_is_called_so(
    copied: Callable[[], Path], monkeypatch: pytest.MonkeyPatch, speedup: float, unsteady: bool
) -> None:
    folder = copied()
    shutil.rmtree(folder / "fit")
    timing = fit._Timed(speedup, 1.8, 1.0, speedup)
    slow = FitResult(Candidate(Structure({}), 1.0, 1.0, [timing], parse_budget("2x")), False)

    def loop(allocate: Any, fastest: Any, *_: Any) -> FitResult:
        slow.chosen.structure, _predicted = fastest()
        return slow

    monkeypatch.setattr("passdeploy.stages.fit.close_loop", loop)
    monkeypatch.setattr("passdeploy.stages.fit.close_gap", lambda found, *_: found)
    run = scripted.start(folder, weights=weights(folder), latency="2x")
    run.slicer = scripted.slicer(run)  # type: ignore[misc]
    run.run_until("fit")
    (said,) = (m for m in json.loads((folder / "fit" / "fit.json").read_text())["messages"] if "No structure" in m)
    assert said.endswith("but not steadily enough to count on it.") == unsteady


def test_what_failed_first_and_was_measured_for_a_gap_has_the_ratio_that_was_measured(
    copied: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied()
    shutil.rmtree(folder / "fit")
    good = fit._Timed(1.35, 1.34, 1.0, 1.35)

    def gap(found: FitResult, *_: Any) -> FitResult:
        other = dataclasses.replace(found.chosen, timings=[fit.UNMEASURED, good])
        return dataclasses.replace(found, candidates=[*found.candidates, other])

    monkeypatch.setattr("passdeploy.stages.fit.close_gap", gap)
    run = scripted.start(folder, weights=weights(folder))
    run.slicer = scripted.slicer(run)  # type: ignore[misc]
    run.run_until("fit")
    facts = json.loads((folder / "fit" / "fit.json").read_text())
    assert facts["candidates"][-1]["measured_ratio"] == pytest.approx(1 / 1.35)


# --- what it keeps -------------------------------------------------------------------------------------------------


def refuse_to_run(monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]) -> None:
    for stage in names:
        bodies: dict[str, Any] = SHARED if stage in SHARED else PER_BUDGET  # type: ignore[assignment]
        monkeypatch.setitem(bodies, stage, lambda *_: pytest.fail("a finished stage was run again"))


def test_the_same_again_runs_nothing(copied: Callable[[], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copied()
    before = {path: digest(path) for path in folder.rglob("*") if path.is_file()}
    refuse_to_run(monkeypatch, STAGES)
    (got,) = again(folder)
    assert got.status == "within_budget"
    # config.yaml was written by the helper, with other line breaks.
    after = {path: digest(path) for path in folder.rglob("*") if path.is_file()}
    assert {p: d for p, d in after.items() if p.name != "config.yaml"} == {
        p: d for p, d in before.items() if p.name != "config.yaml"
    }


def test_a_damaged_file_is_made_again_and_nothing_else(
    copied: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied()
    (folder / "ship" / "bundle" / "model.onnx").write_bytes(b"")
    refuse_to_run(monkeypatch, STAGES[:-1])
    again(folder)
    assert digest(folder / "bundle" / "model.onnx") == digest(folder / "model.onnx")


def test_another_configuration_is_refused_and_nothing_lost(single: Path) -> None:
    before = digest(single / "report.json")
    with pytest.raises(BadInput, match=r"differs in: latency, search\.epochs, seed\)") as refused:
        scripted.start(single, weights=weights(single), latency="3x", seed=7, search={"epochs": 2.0})
    assert "--fresh" in str(refused.value)
    assert digest(single / "report.json") == before


def test_what_is_only_required_may_differ(copied: Callable[[], Path]) -> None:
    """And remakes nothing: a bundle that was signed meanwhile would lose its signature."""
    folder = copied()
    running = scripted.start(folder, weights=weights(folder), require_measured=True)
    (budget,) = running.runs
    assert all(budget.space.current(name, running.inputs(name, budget)) for name in PER_BUDGET)
    assert yaml.safe_load((folder / "config.yaml").read_text())["require_measured"], "the stages alone read it there"


def test_a_stage_that_starts_over_says_why_and_keeps_what_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(running: Run, folder: Path) -> None:
        (folder / "train.ckpt").write_text("five hours")
        raise KeyboardInterrupt

    for version in ("1", "2"):
        monkeypatch.setattr(dependencies, "version", lambda version=version: version)
        monkeypatch.setitem(SHARED, "dense", interrupted)
        running = scripted.start(tmp_path / "run")
        running.ui = Ui()
        with pytest.raises(KeyboardInterrupt):
            running.shared("dense")
        said = capsys.readouterr().err
        assert ("dense: starts over, since the version of passdeploy changed since it was begun" in said) == (
            version == "2"
        )
    assert (tmp_path / "run" / ".partial" / "dense.before" / "train.ckpt").read_text() == "five hours"


def test_fresh_starts_over(copied: Callable[[], Path]) -> None:
    folder = copied()
    running = scripted.start(folder, seed=7, fresh=True)
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml"]
    assert running.config.seed == 7


def test_fresh_keeps_what_no_run_wrote_and_what_it_reads(copied: Callable[[], Path], tmp_path: Path) -> None:
    folder = copied()
    (folder / "2x").mkdir()
    for inside, given in (
        ("notes", {}),
        ("2x/photos", {}),
        ("dense/dense.safetensors", {"weights": str(folder / "dense" / "dense.safetensors")}),
        ("profile/profile.json", {"profile_file": str(folder / "profile" / ".." / "profile" / "profile.json")}),
    ):
        stranger = folder / inside
        if not given:
            stranger.mkdir()
        before = sorted(folder.rglob("*"))
        with pytest.raises(BadInput, match=rf"{stranger.name}.*which --fresh would delete|and --fresh .*: {inside};"):
            scripted.start(folder, fresh=True, **given)
        assert sorted(folder.rglob("*")) == before
        if not given:
            stranger.rmdir()
    scripted.start(folder, fresh=True)
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]


def test_clearing_that_is_killed_can_be_repeated(copied: Callable[[], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    folder, real = copied(), Path.unlink

    def killed(path: Path, missing_ok: bool = False) -> None:
        real(path, missing_ok)
        if path.name != ".lock" and not path.name.startswith(".probe"):
            raise Killed

    left = -1
    while left != 0:
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            patch.setattr(Path, "unlink", killed)
            Workspace(folder).clear()
        left = len(list(folder.iterdir()))


def test_fresh_deletes_no_other_folder(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years")
    for fresh in (False, True):
        with pytest.raises(BadInput, match="not a run directory"):
            scripted.start(tmp_path, fresh=fresh)
    assert (tmp_path / "thesis.tex").read_text() == "years"
