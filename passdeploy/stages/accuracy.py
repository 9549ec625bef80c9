"""Accuracy of what is compiled: in a lower precision it is not the network's, and is measured, never assumed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from passdeploy.data.base import Split
from passdeploy.engines.base import CompileInput, Engine, get_backend
from passdeploy.export import INPUT, OUTPUT, onnx_function
from passdeploy.stages.proof import in_batches
from passdeploy.targets import Target
from passdeploy.tasks import Task
from passdeploy.timing import open_runner
from passdeploy.training import fitting_batch, judge

if TYPE_CHECKING:
    from passdeploy.pipeline import Run

IMAGES = 256
"""Small images that are fetched together, whatever the engine's batch is; fewer large ones, which are held with their
outputs."""


@dataclass(frozen=True)
class EngineAccuracy:
    """The task's metric, in [0, 1].

    Attributes:
        value: On the test set; None where that is empty.
        of: ``engine``, or, where that can't run, ``graph``: what it is built from.
        validation: On the validation split; None where that was not asked for.
    """

    value: float | None
    of: Literal["engine", "graph"]
    validation: float | None = None


def accuracy_in_precision(
    run: Run, engine: Engine, source: CompileInput, target: Target, validation: bool = False
) -> EngineAccuracy | None:
    """Accuracy of an engine in its target's precision; None where neither it nor its graph can be executed.

    Args:
        run: For its data and task.
        engine: Compiled for `target`.
        source: What it was compiled from; the samples calibrate the graph that stands in for it.
        target: The run's, possibly in another precision.
        validation: Also on the validation split: where something is decided by it.

    Raises:
        BadInput: The engine can't be executed, and its graph leaves the precision's range.
    """

    def judged(call: Callable[[np.ndarray], np.ndarray], of: Literal["engine", "graph"]) -> EngineAccuracy:
        on_validation = accuracy_of(call, data.val, batch, task) if validation else None
        return EngineAccuracy(accuracy_of(call, data.test, batch, task), of, on_validation)

    backend, data, task, batch = get_backend(engine.backend), run.subject.data, run.subject.task, target.batch
    if target.attached and backend.runnable(target) is None:
        with open_runner(engine, target, run.validation_images[:batch]) as runner:
            return judged(lambda images: runner.run({INPUT: images})[OUTPUT], "engine")
    if target.precision == "bf16":  # ONNX Runtime's CPU kernels lack convolutions in it
        return None
    graph = backend.graph_for(source, target)
    if graph is None:
        return None
    function = onnx_function(graph)
    return judged(lambda images: in_batches(function, images, batch), "graph")


def accuracy_of(
    call: Callable[[np.ndarray], np.ndarray], split: Split, batch: int, task: Task | None = None
) -> float | None:
    """The task's metric of a function as in `filled`; None on an empty split."""
    return judge(filled(call, batch), split, at_a_time(split, batch), task)


def at_a_time(split: Split, batch: int) -> int:
    """How many images of a split are fetched together: whole batches of an engine."""
    return batch * max(1, fitting_batch(split, IMAGES) // batch)


def filled(call: Callable[[np.ndarray], np.ndarray], batch: int) -> Callable[[Tensor], Tensor]:
    """A function of (n, 3, H, W), n a multiple of `batch`, as one of any n: what is short is filled up."""

    def run(images: Tensor) -> Tensor:
        array = images.numpy()
        array = np.concatenate([array, np.repeat(array[:1], -len(array) % batch, axis=0)])
        return torch.from_numpy(np.asarray(call(array)[: len(images)]))

    return run
