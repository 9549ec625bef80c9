"""The engine file that ships, timed against the dense engine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from passdeploy.engines.files import load_engine
from passdeploy.latency.log import MeasurementLog
from passdeploy.meter import compare_engines
from passdeploy.stages.alternatives import compiled_alternatives, time_together
from passdeploy.stages.common import fitted_structure
from passdeploy.stages.fit import bench_settings
from passdeploy.workspace import write_json

if TYPE_CHECKING:
    from passdeploy.pipeline import BudgetRun, Run

LOADS = 3
"""Where buffers happen to lie moves an engine's latency by up to 2 %: the load in the middle of these is reported."""


def run_bench(run: Run, budget: BudgetRun, folder: Path) -> None:
    """Times the very engine file that ships against the dense engine, interleaved."""
    if not run.measured:
        write_json(folder / "bench.json", {"measured": False})
        return
    compiled = budget.space.folder("compile")
    engines = {"dense": load_engine(compiled / "dense-engine"), "thin": load_engine(compiled / "engine")}
    log = MeasurementLog(folder / "measurements.jsonl")

    def take() -> dict[str, Any]:
        images = run.validation_images[: run.target.batch]
        loads = []
        for done in range(LOADS):
            run.ui.step(done, LOADS)
            loads.append(compare_engines(engines, run.target, images, run.config.scope, bench_settings(budget.budget)))
        loads.sort(key=lambda comparison: comparison.ratio("thin").value)
        comparison = loads[LOADS // 2]
        return {
            "loads": [comparison.ratio("thin").value for comparison in loads],
            "ratio": comparison.ratio("thin").to_json(),
            **{name: m.to_json(samples=True) for name, m in comparison.measurements.items()},
        }

    record = log.measure("bench", fitted_structure(budget.space.folder("fit")).digest(), run.target.name, take)
    beside = compiled_alternatives(run)
    together = None
    if beside:
        both = {"dense": (engines["dense"], run.target), "thin": (engines["thin"], run.target)}
        together = log.measure(
            "alternatives", record.digest, run.target.name, lambda: time_together(run, {**both, **beside})
        ).value
    write_json(folder / "bench.json", {"measured": True, **record.value, "alternatives": together})
    logs = [run.space.folder("profile"), budget.space.folder("fit"), folder]
    everything = folder / "everything.tmp"
    everything.write_text("".join(p.read_text() for p in (f / "measurements.jsonl" for f in logs) if p.exists()))
    MeasurementLog(everything).write_csv(folder / "measurements.csv")
