"""The thin network, trained: rebuilt from the structure, batch norms re-estimated, weights and prompt fine-tuned."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

from passdeploy.checkpoint import Checkpoint
from passdeploy.config import RunConfig
from passdeploy.groups import macs
from passdeploy.restoring import restore
from passdeploy.search.method import SearchResult
from passdeploy.search.prompt import Prompted
from passdeploy.stages.common import accuracies, fitted_structure, input_stage, kept_widths, plain
from passdeploy.surgery import apply_architecture, architecture
from passdeploy.training import TrainSettings, evaluate, reestimate_batch_norm, train, training_device
from passdeploy.weights import save_weights
from passdeploy.workspace import read_json, write_json

if TYPE_CHECKING:
    from passdeploy.pipeline import BudgetRun, Run


def finetune_settings(config: RunConfig, extra_steps: int, adapted: bool = False) -> TrainSettings:
    """How a thin network is trained.

    Args:
        config: Of the run.
        extra_steps: On top of the configured ones: those that a method without a search of its own has left.
        adapted: The weights come from a search that trained them: the rate goes on at its peak, without a warm-up.
    """
    return TrainSettings(
        epochs=config.finetune_epochs(),
        batch=config.train_batch,
        lr=config.finetune.lr,
        weight_decay=config.finetune.weight_decay,
        distill=config.finetune.distill,
        warmup=0.0 if adapted else 0.1,
        seed=config.seed + 2,
        min_steps=config.finetune.min_steps,
        extra_steps=extra_steps,
    )


def run_finetune(run: Run, budget: BudgetRun, folder: Path) -> None:
    """Rebuilds the network thin, re-estimates its batch norms and trains weights and prompt."""
    subject, config = run.subject, run.config
    fitted = budget.space.folder("fit")
    facts, structure = read_json(fitted / "fit.json"), fitted_structure(fitted)
    result = SearchResult.load(run.space.folder("search"))
    arch = architecture(subject.groups, structure)
    write_json(folder / "architecture.json", arch)
    untouched = facts["status"] == "dense_inside"
    state = run.dense_state() if untouched else result.network
    network = apply_architecture(subject.with_state(state), arch)
    model = Prompted(input_stage(run, {} if untouched else result.stage), network)
    curve, before = None, None
    if not untouched:
        reestimate_batch_norm(model.to(training_device()), subject.data, seed=config.seed)
        before = evaluate(model, subject.data.val, task=subject.task)
        settings = finetune_settings(config, result.unspent_steps, result.adapted)
        teacher = plain(run, subject.with_state(run.dense_state()))
        checkpoint = Checkpoint(folder / "finetune.ckpt")
        curve = vars(train(model, subject.data, settings, teacher=teacher, checkpoint=checkpoint, progress=run.ui.step))
    model = model.cpu().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    save_weights(model.network, folder / "model.safetensors")
    if untouched:
        accuracy = read_json(run.space.folder("dense") / "dense.json")["accuracy"]
    else:
        accuracy = accuracies(model, subject)
    without = None
    if model.stage.prompt is not None:
        save_file({"prompt": model.stage.prompt.detach().contiguous()}, folder / "prompt.safetensors")
        without = evaluate(plain(run, model.network), subject.data.val, task=subject.task)
    write_json(
        folder / "finetune.json",
        {
            "accuracy": accuracy,
            "accuracy_before": before,
            "accuracy_without_prompt": without,
            "curve": curve,
            "macs": float(macs(subject.operators, kept_widths(run, structure))),
            "params": sum(p.numel() for p in model.network.parameters()),
        },
    )


def thin_model(run: Run, budget: BudgetRun) -> Prompted:
    """The fine-tuned thin network with its prompt."""
    folder = budget.space.folder("finetune")
    network = apply_architecture(run.subject.build(), read_json(folder / "architecture.json"))
    restore(network, load_file(folder / "model.safetensors"))
    prompt = folder / "prompt.safetensors"
    stage = input_stage(run, load_file(prompt) if prompt.exists() else {})
    return Prompted(stage, network).eval()
