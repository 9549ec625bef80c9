"""The sealed bundle around the engine that was measured."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from passdeploy.workspace import read_json

if TYPE_CHECKING:
    from passdeploy.pipeline import BudgetRun, Run


def run_ship(run: Run, budget: BudgetRun, folder: Path) -> None:
    """Writes the sealed bundle around the engine that was measured."""
    from passdeploy.shipping.bundle import SAMPLES, BundleSource, EngineSource, write_bundle

    compiled, tuned = budget.space.folder("compile"), budget.space.folder("finetune")
    images = run.sampled_images(SAMPLES)
    data = run.subject.data
    prompt = tuned / "prompt.safetensors"
    report = read_json(budget.space.folder("report") / "report.json")
    source = BundleSource(
        name=f"{run.subject.name}-{data.name}-{run.target.name}-{budget.budget.asked}",
        model=run.subject.name,
        data=data.name,
        classes=data.classes,
        preprocess=data.preprocess,
        onnx=compiled / "model.onnx",
        # A speed-up can only be judged again, where the bundle arrives, beside the dense graph.
        dense_onnx=compiled / "dense.onnx" if budget.budget.speedup is not None else None,
        engines=[EngineSource(compiled / "engine", run.target)],
        images=images,
        report=report,
        data_licence=data.licence,
        config=run.space.root / "config.yaml",
        structure=budget.space.folder("fit") / "structure.json",
        architecture=tuned / "architecture.json",
        weights=tuned / "model.safetensors",
        prompt=prompt if prompt.exists() else None,
    )
    shutil.rmtree(folder / "bundle", ignore_errors=True)
    write_bundle(folder / "bundle", source)
