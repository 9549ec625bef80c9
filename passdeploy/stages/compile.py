"""Export and compilation of the thin and of the dense network, with the proof that nothing changed on the way."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from passdeploy.engines.base import CompileInput, Engine, get_backend
from passdeploy.engines.files import load_engine
from passdeploy.export import INPUT, OUTPUT, export_onnx, export_program, onnx_function
from passdeploy.rebuilds import with_rebuilds
from passdeploy.stages.accuracy import accuracy_in_precision
from passdeploy.stages.common import plain
from passdeploy.stages.finetune import thin_model
from passdeploy.stages.proof import TOLERANCE, array_difference, in_batches, proof_holds
from passdeploy.timing import open_runner
from passdeploy.workspace import read_json, write_json

if TYPE_CHECKING:
    from passdeploy.pipeline import BudgetRun, Run


def run_compile(run: Run, budget: BudgetRun, folder: Path) -> None:
    """Exports and compiles the thin and the dense network; proves thin == ONNX == engine."""
    target, images = run.target, run.validation_images
    images = images[: len(images) // target.batch * target.batch]
    shape = run.subject.data.input_shape
    backend, calibration = get_backend(target.backend), run.calibration_images
    model = thin_model(run, budget)
    dense = plain(run, run.subject.with_state(run.dense_state()))
    engines: dict[str, Engine] = {}
    for done, (name, network) in enumerate({"model": model, "dense": dense}.items()):
        run.ui.step(done, 2, f"exporting and compiling {name}")
        path = export_onnx(network, folder / f"{name}.onnx", shape, target.batch)
        program = export_program(network, images[: target.batch]) if backend.wants_program else None
        source = CompileInput(onnx=path, exported_program=program, samples=calibration)
        engines[name] = backend.compile(source, target)
        if name == "model":  # what another build would have given belongs to the record of the one that ships
            engines[name] = with_rebuilds(engines[name], source, target, images[: target.batch], run.config.scope)
    backend.save(engines["model"], folder / "engine")
    backend.save(engines["dense"], folder / "dense-engine")
    with torch.no_grad():
        expected = model(torch.from_numpy(images)).numpy()
    data = (folder / "model.onnx").read_bytes()
    from_onnx = in_batches(onnx_function(data), images, target.batch)
    proof: dict[str, Any] = {
        "masked_vs_thin": read_json(budget.space.folder("fit") / "fit.json")["masked_vs_thin"],
        "thin_vs_onnx": array_difference(expected, from_onnx),
        "onnx_vs_engine": None,
        "top1_agreement": None,
        "tolerance": TOLERANCE[target.precision],
        "images": len(images),
    }
    if run.measured:
        with open_runner(load_engine(folder / "engine"), target, images[: target.batch]) as runner:
            from_engine = in_batches(lambda part: runner.run({INPUT: part})[OUTPUT], images, target.batch)
        proof["onnx_vs_engine"] = array_difference(from_onnx, from_engine)
        agreement = run.subject.task.agreement(torch.from_numpy(from_onnx), torch.from_numpy(from_engine))
        proof["top1_agreement"] = agreement
    write_json(folder / "accuracy.json", shipped_accuracy(run, folder, engines, calibration))
    write_json(folder / "proof.json", proof | {"ok": proof_holds(proof)})


def shipped_accuracy(
    run: Run, folder: Path, engines: dict[str, Engine], calibration: np.ndarray
) -> dict[str, Any] | None:
    """Accuracy in the target's precision; None in fp32, where the network's own holds (it is proven to be the same)."""
    if run.target.precision == "fp32":
        return None
    found: dict[str, Any] = {}
    for done, name in enumerate(("dense", "model")):
        run.ui.step(done, 2, f"accuracy in {run.target.precision}")
        source = CompileInput(onnx=folder / f"{name}.onnx", samples=calibration)
        accuracy = accuracy_in_precision(run, engines[name], source, run.target)
        if accuracy is None:
            return None
        found |= {name: accuracy.value, "of": accuracy.of}
    return found
