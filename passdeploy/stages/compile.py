"""Export and compilation of the thin and of the dense network, with the proof that nothing changed on the way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from passdeploy.data.ahead import images_of
from passdeploy.data.base import evenly
from passdeploy.engines.base import TOLERANCE, CompileInput, Engine, get_backend
from passdeploy.engines.files import load_engine
from passdeploy.export import INPUT, OUTPUT, export_onnx, export_program, onnx_function
from passdeploy.rebuilds import with_rebuilds
from passdeploy.stages.accuracy import accuracy_in_precision, at_a_time, filled
from passdeploy.stages.common import plain
from passdeploy.stages.finetune import thin_model
from passdeploy.stages.proof import AGREEMENT_IMAGES, array_difference, in_batches, proof_holds
from passdeploy.timing import open_runner
from passdeploy.training import fitting_batch
from passdeploy.workspace import link_file, link_folder, read_json, write_json

if TYPE_CHECKING:
    from passdeploy.pipeline import BudgetRun, Run

Call = Callable[[np.ndarray], np.ndarray]


def run_compile(run: Run, budget: BudgetRun, folder: Path) -> None:
    """Exports and compiles the thin and the dense network; proves thin == ONNX == engine.

    The dense one once for all budgets: it is the same, and a builder that times kernels may take minutes.
    """
    target, images = run.target, run.validation_images
    images = images[: len(images) // target.batch * target.batch]
    shape = run.subject.data.input_shape
    backend, calibration = get_backend(target.backend), run.calibration_images
    model = thin_model(run, budget)
    networks: dict[str, nn.Module] = {"model": model}
    engines: dict[str, Engine] = {}
    made = _with_dense(run, budget)
    if made is None:
        networks["dense"] = plain(run, run.subject.with_state(run.dense_state()))
    else:
        link_file(made / "dense.onnx", folder / "dense.onnx")
        link_folder(made / "dense-engine", folder / "dense-engine")
        engines["dense"] = load_engine(folder / "dense-engine")
    for done, (name, network) in enumerate(networks.items()):
        run.ui.step(done, len(networks), f"exporting and compiling {name}")
        path = export_onnx(network, folder / f"{name}.onnx", shape, target.batch)
        program = export_program(network, images[: target.batch]) if backend.wants_program else None
        source = CompileInput(onnx=path, exported_program=program, samples=calibration)
        engines[name] = backend.compile(source, target)
        if name == "model":  # what another build would have given belongs to the record of the one that ships
            engines[name] = with_rebuilds(engines[name], source, target, images[: target.batch], run.config.scope)
    backend.save(engines["model"], folder / "engine")
    if made is None:
        backend.save(engines["dense"], folder / "dense-engine")
    with torch.no_grad():
        size = fitting_batch(run.subject.data.val, len(images))
        expected = torch.cat([model(part) for part in torch.from_numpy(images).split(size)]).numpy()
    onnx = onnx_function((folder / "model.onnx").read_bytes())
    from_onnx = in_batches(onnx, images, target.batch)
    proof: dict[str, Any] = {
        "masked_vs_thin": read_json(budget.space.folder("fit") / "fit.json")["masked_vs_thin"],
        "thin_vs_onnx": array_difference(expected, from_onnx),
        "onnx_vs_engine": None,
        "top1_agreement": None,
        "tolerance": TOLERANCE[target.precision],
        "images": len(images),
        "agreement_images": None,
    }
    if run.measured:
        with open_runner(load_engine(folder / "engine"), target, images[: target.batch]) as runner:
            call = lambda part: runner.run({INPUT: part})[OUTPUT]  # noqa: E731
            from_engine = in_batches(call, images, target.batch)
            proof["onnx_vs_engine"] = array_difference(from_onnx, from_engine)
            if target.precision == "fp32":
                pair = torch.from_numpy(from_engine), torch.from_numpy(from_onnx)
                proof |= {"top1_agreement": run.subject.task.agreement(*pair), "agreement_images": len(images)}
            else:
                proof |= judged_agreement(run, call, lambda part: in_batches(onnx, part, target.batch))
    write_json(folder / "accuracy.json", shipped_accuracy(run, folder, engines, calibration))
    write_json(folder / "proof.json", proof | {"ok": proof_holds(proof)})


def _with_dense(run: Run, budget: BudgetRun) -> Path | None:
    """Where this stage has left the same dense network's graph and engine, for another budget of the run."""
    for other in run.runs:
        # In this order: what a stage depends on can only be told when the one before it is there.
        stages = () if other is budget else ("fit", "finetune", "compile")
        if stages and all(other.space.current(stage, run.inputs(stage, other)) for stage in stages):
            return other.space.folder("compile")
    return None


def judged_agreement(run: Run, engine: Call, graph: Call) -> dict[str, Any]:
    """The share of many images that get the same class from both: what 0.99 means takes more than 64 of them."""
    split, batch, task = run.subject.data.val, run.target.batch, run.subject.task
    indices = evenly(split, min(AGREEMENT_IMAGES, len(split)))
    agreeing = 0.0
    size = at_a_time(split, batch)
    for images in images_of(split, indices.split(size), size):
        pair = (filled(call, batch)(images) for call in (engine, graph))
        agreeing += task.agreement(*pair) * len(images)
    return {"top1_agreement": agreeing / len(indices), "agreement_images": len(indices)}


def shipped_accuracy(
    run: Run, folder: Path, engines: dict[str, Engine], calibration: np.ndarray
) -> dict[str, Any] | None:
    """Accuracy in the target's precision; None in fp32, where the network's own holds (it is proven to be the same).

    On the test set of both networks, and, where a minimum was asked for, on the validation split of the one that ships.
    """
    if run.target.precision == "fp32":
        return None
    found: dict[str, Any] = {}
    for done, name in enumerate(("dense", "model")):
        run.ui.step(done, 2, f"accuracy in {run.target.precision}")
        source = CompileInput(onnx=folder / f"{name}.onnx", samples=calibration)
        decides = name == "model" and run.config.min_accuracy is not None
        accuracy = accuracy_in_precision(run, engines[name], source, run.target, validation=decides)
        if accuracy is None:
            return None
        found |= {name: accuracy.value, "of": accuracy.of}
        if decides:
            found["validation"] = accuracy.validation
    return found
