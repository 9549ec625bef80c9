"""The dense network: trained where no weights were given, and what it is worth."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from passdeploy.checkpoint import Checkpoint
from passdeploy.export import export_model
from passdeploy.groups import macs
from passdeploy.remarks import untrained
from passdeploy.stages.common import accuracies, plain
from passdeploy.training import TrainSettings, train
from passdeploy.weights import save_weights
from passdeploy.workspace import write_json

if TYPE_CHECKING:
    from passdeploy.pipeline import Run


def run_dense(run: Run, folder: Path) -> None:
    """Trains the dense network when no weights were given, and records what it is worth; neither for latency alone."""
    subject, config = run.subject, run.config
    model = plain(run, subject.network)
    curve: dict[str, Any] | None = None
    if subject.weights is None and not run.latency_only:
        settings = TrainSettings(
            epochs=config.dense_epochs(),
            batch=config.train_batch,
            lr=config.dense.lr,
            seed=config.seed,
            min_steps=config.dense.min_steps,
        )
        checkpoint = Checkpoint(folder / "train.ckpt")
        if checkpoint.load() is None:  # what can't be compiled is told now, and not hours later by the next stage
            export_model(model, subject.data.input_shape, config.batch)
        curve = vars(train(model, subject.data, settings, checkpoint=checkpoint, progress=run.ui.step))
    accuracy = None if run.latency_only else accuracies(model, subject)
    for remark in untrained(subject, None if accuracy is None else accuracy["validation"]):
        run.ui.say(remark)
    save_weights(model.network, folder / "dense.safetensors")
    write_json(
        folder / "dense.json",
        {
            "model": subject.name,
            "weights": subject.weights or ("untrained" if run.latency_only else f"trained here on {subject.data.name}"),
            "accuracy": accuracy,
            "macs": float(macs(subject.operators)),
            "params": sum(p.numel() for p in model.network.parameters()),
            "curve": curve,
        },
    )
