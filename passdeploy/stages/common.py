"""What several stages need: the networks of a run in their input stage, its structures, and how these are timed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from passdeploy.budget import Budget
from passdeploy.errors import BadInput
from passdeploy.export import OnnxSlicer
from passdeploy.latency.log import attempt
from passdeploy.latency.measure import BENCH, Settings
from passdeploy.latency.stats import min_samples
from passdeploy.meter import Meter
from passdeploy.search.prompt import InputStage, Prompted
from passdeploy.structure import Structure
from passdeploy.subject import Subject
from passdeploy.training import evaluate

if TYPE_CHECKING:
    from passdeploy.pipeline import Run

PAIRS = 20
"""Rounds in each process: more would tell more about that process only."""


def plain(run: Run, network: nn.Module) -> Prompted:
    """A network behind its normalisation, without a prompt."""
    return Prompted(InputStage(run.subject.data.preprocess), network)


def input_stage(run: Run, state: dict[str, Tensor]) -> InputStage:
    """The input stage with the learnt prompt, if there is one."""
    prompt = run.config.prompt
    stage = InputStage(run.subject.data.preprocess, prompt.kind if state else "none", prompt.width)
    stage.load_state_dict(state)
    return stage


def accuracies(model: nn.Module, subject: Subject) -> dict[str, float | None]:
    """The task's metric on the validation split and on the test set; None where that is empty."""
    data, task = subject.data, subject.task
    return {"validation": evaluate(model, data.val, task=task), "test": evaluate(model, data.test, task=task)}


def fitted_structure(folder: Path) -> Structure:
    """What a finished fit stage chose."""
    return Structure.load(folder / "structure.json")


def kept_widths(run: Run, structure: Structure) -> np.ndarray:
    """Units that a structure keeps [groups]."""
    widths = run.subject.groups.canonical(structure).widths()
    return np.array([widths[name] for name in run.subject.groups.names])


def slicer(run: Run, stage: InputStage | None = None) -> OnnxSlicer:
    """Thin ONNX files of the dense network, for measuring; behind an input stage other than the plain one if given."""
    network = run.subject.with_state(run.dense_state())
    model = plain(run, network) if stage is None else Prompted(stage, network)
    return OnnxSlicer(model, run.subject.groups, run.subject.data.input_shape, run.target.batch)


def meter(run: Run, stage: InputStage | None = None) -> Meter:
    """Times structures of the dense network on the target.

    Args:
        run: The run.
        stage: What the thin networks will ship with. An expansive prompt resizes and pads, which takes time; an
            additive one is as quick as none.
    """
    behind = slicer(run, stage) if stage is not None and stage.kind == "expansive" else None
    images, scope = run.validation_images, run.config.scope
    return Meter(run.slicer, run.subject.groups, run.target, images, scope, thin_slicer=behind)


def bench_settings(budget: Budget) -> Settings:
    """Long enough to say something about the budget's percentile."""
    return dataclasses.replace(BENCH, pairs=PAIRS, percentiles=(50.0, budget.percent))


def fit_settings(budget: Budget) -> Settings:
    """Long enough to decide: a speed-up is judged by block medians, so that no percentile is waited for."""
    settings = bench_settings(budget)
    return settings if budget.latency_ms is not None else dataclasses.replace(settings, percentiles=(50.0,))


def time_structure(timed: Meter, structure: Structure, budget: Budget, ran_before: bool = False) -> dict[str, Any]:
    """Times a structure against the dense engine, for a log.

    Args:
        timed: Measures it.
        structure: What is measured.
        budget: What it will be held against.
        ran_before: It was measured before: what fails now, a child that was killed or ran out of time, says nothing of
            the structure.

    Returns:
        ``speedup`` with the lower end of its interval (``low``), ``thin_ms`` and ``dense_ms`` at the budget's
        percentile (None where there are too few samples), the dense engine's median (``pace_ms``); ``failed`` alone,
        with why, where it can't be compiled or run.

    Raises:
        BadInput: The dense engine, or what was measured before, can't be measured, or an inference takes too long for
            the percentile of a budget in time.
    """

    def take() -> dict[str, Any]:
        comparison = timed.compare(structure, fit_settings(budget))
        ratio = comparison.ratio("thin")
        at = {name: engine.at(budget.percent) for name, engine in comparison.measurements.items()}
        pace = comparison.measurements["dense"].p50
        return {
            "speedup": ratio.value, "low": ratio.low, "thin_ms": at["thin"], "dense_ms": at["dense"], "pace_ms": pace
        }  # fmt: skip

    runs = ran_before or structure.digest() == timed.groups.dense().digest()
    value = take() if runs else dict(attempt(take))
    if budget.latency_ms is not None and "failed" not in value and value["thin_ms"] is None:
        raise BadInput(
            f"--percentile {budget.percentile}: an inference takes too long to time the "
            f"{min_samples(budget.percent)} that it needs; give a lower one, or a speed-up"
        )
    return value
