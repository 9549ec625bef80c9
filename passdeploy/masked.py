"""`passdeploy compile --masked`: the masked network compiled as it is, beside the dense and the thin engine.

Masking alone saves next to nothing: every channel is still computed. The three latencies side by side say so, which is
why surgery exists; and the masked engine must compute what the thin one does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from passdeploy.engines.base import TOLERANCE, CompileInput, Engine, get_backend
from passdeploy.engines.files import FACTS as ENGINE
from passdeploy.engines.files import load_engine
from passdeploy.errors import NotEquivalent
from passdeploy.export import INPUT, OUTPUT, export_onnx, export_program, onnx_function
from passdeploy.kernels.masked_forward import masked_network
from passdeploy.latency.measure import BENCH
from passdeploy.reporting import load_report, write_reports
from passdeploy.reporting.engines import Latency, MaskedInfo
from passdeploy.search.method import SearchResult
from passdeploy.search.prompt import Prompted
from passdeploy.stages.common import input_stage
from passdeploy.structure import Structure
from passdeploy.surgery import relative_difference, thin
from passdeploy.timing import compare_engines, open_runner
from passdeploy.workspace import read_json, sha256, write_json

if TYPE_CHECKING:
    from torch import nn

    from passdeploy.pipeline import BudgetRun, Run

FOLDER, FACTS = "masked", "masked.json"


def compile_masked(run: Run, budget: BudgetRun) -> Path:
    """Compiles the network under the structure's masks, proves masked == thin on the engines, and times the three.

    Weights are those that the search left: before fine-tuning the masked and the thin network are the same function.
    The kernel masks as an operator in inductor and as a plugin in full TensorRT; elsewhere plain multiplications do.

    Args:
        run: With finished stages up to ``compile``.
        budget: Of the run.

    Returns:
        The folder, ``DIR/masked``.

    Raises:
        BadInput: The network's graph can't be traced.
        NotEquivalent: The masked engine does not compute what the thin one does.
    """
    target, images = run.target, run.validation_images
    images = images[: len(images) // target.batch * target.batch]
    folder = budget.space.root / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FACTS).unlink(missing_ok=True)  # what was found before holds no more, whatever comes of this
    structure = Structure.load(budget.space.folder("fit") / "structure.json")
    result = SearchResult.load(run.space.folder("search"))
    model = Prompted(input_stage(run, result.stage), run.subject.with_state(result.network)).cpu().float().eval()
    groups, backend, calibration = run.subject.groups, get_backend(target.backend), run.calibration_images

    def compiled(name: str, plain: nn.Module, program: nn.Module) -> Engine:
        path = export_onnx(plain, folder / f"{name}.onnx", run.subject.data.input_shape, target.batch)
        exported = export_program(program, images[: target.batch]) if backend.wants_program else None
        return backend.compile(CompileInput(path, exported, calibration, masked=name == "masked"), target)

    small = Prompted(model.stage, thin(model.network, groups, structure).eval())
    plain = masked_network(model, groups, structure, "network.", plain=True)
    by_kernel = backend.masks_by_kernel(target)
    program = masked_network(model, groups, structure, "network.") if by_kernel else plain
    engines = {
        "dense": load_engine(budget.space.folder("compile") / "dense-engine"),
        "masked": compiled("masked", plain, program),
        "thin": compiled("thin", small, small),
    }
    outputs = {name: _outputs(run, engines[name], folder / f"{name}.onnx", images) for name in ("masked", "thin")}
    difference = relative_difference(torch.from_numpy(outputs["thin"]), torch.from_numpy(outputs["masked"]))
    tolerance = TOLERANCE[target.precision] if run.measured else TOLERANCE["fp32"]
    if not difference <= tolerance:
        raise NotEquivalent(
            f"compile --masked: the masked engine differs from the thin one by {difference:.1e} (allowed "
            f"{tolerance:.0e}) on {target.backend}; the report is as it was"
        )
    facts: dict[str, Any] = {"of": _of(budget.space.folder("fit"), budget.space.folder("compile"))}
    facts |= {"difference": difference}
    facts |= {"kernel": by_kernel}
    facts |= {"engines_compared": run.measured, "latency_ms": None, "speedup": None}
    if run.measured:
        settings = dataclasses.replace(BENCH, percentiles=(50.0,))
        compared = compare_engines(engines, target, images[: target.batch], run.config.scope, settings)
        facts["latency_ms"] = {name: m.to_json() for name, m in compared.measurements.items()}
        facts["speedup"] = {name: compared.ratio(name).to_json() for name in ("masked", "thin")}
    backend.save(engines["masked"], folder / "engine")
    write_json(folder / FACTS, facts)
    attach(budget.space.root)
    return folder


def _outputs(run: Run, engine: Engine, graph: Path, images: np.ndarray) -> np.ndarray:
    """Of the engine, or of the graph it was built from where the engine can't run."""
    batch = run.target.batch
    parts = [images[i : i + batch] for i in range(0, len(images), batch)]
    if not run.measured:
        function = onnx_function(graph.read_bytes())
        return np.concatenate([function(part) for part in parts])
    with open_runner(engine, run.target, parts[0]) as runner:
        return np.concatenate([runner.run({INPUT: part})[OUTPUT] for part in parts])


def _interval(measured: Mapping[str, float | None]) -> tuple[float, float] | None:
    """None where an end is not known, as with too few blocks."""
    low, high = measured["low"], measured["high"]
    return None if low is None or high is None else (low, high)


def _of(fitted: Path, compiled: Path) -> dict[str, str] | None:
    """What a masked engine was made beside: digests of the structure and of the thin engine's record."""
    structure, engine = fitted / "structure.json", compiled / "engine" / ENGINE
    if not (structure.exists() and engine.exists()):
        return None
    return {"structure": Structure.load(structure).digest(), "engine": sha256(engine)}


def attach(root: Path) -> None:
    """Writes a budget's report again with what `compile_masked` found, if that holds for its structure and engine."""
    facts_path, report_path = root / FOLDER / FACTS, root / "report.json"
    if not (facts_path.exists() and report_path.exists()):
        return
    facts = read_json(facts_path)
    if facts.get("of") != _of(root, root):
        return  # of an earlier state
    latency, speedup = facts["latency_ms"] or {}, facts["speedup"] or {}

    def read(name: str) -> Latency | None:
        return Latency(**{k: latency[name][k] for k in ("p50", "p90", "p99", "mean", "n")}) if latency else None

    masked = MaskedInfo(
        kernel=facts["kernel"],
        masked_vs_thin=facts["difference"],
        dense=read("dense"),
        masked=read("masked"),
        thin=read("thin"),
        speedup=speedup["masked"]["value"] if speedup else None,
        speedup_ci95=_interval(speedup["masked"]) if speedup else None,
        thin_speedup=speedup["thin"]["value"] if speedup else None,
    )
    write_reports(load_report(report_path).model_copy(update={"masked": masked}), root)
