"""The search: scores for every unit, by PASS or a baseline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from passdeploy.budget import Budget
from passdeploy.checkpoint import Checkpoint
from passdeploy.latency.log import MeasurementLog
from passdeploy.latency.loop import AIM
from passdeploy.search.method import SearchContext, SearchResult, get_method
from passdeploy.stages.common import meter, time_structure
from passdeploy.stages.profile import Predictor, stage_model

if TYPE_CHECKING:
    from passdeploy.pipeline import Run


NEARLY_DENSE = 0.95
"""Share of the dense latency that is searched for where a model of measurements says that the dense engine is inside
already: the measurement that decides may say otherwise, and then the scores are needed."""
FAR_INSIDE = 2.0
"""A budget in time that is so many times what the dense engine was measured at here is not searched for: hours would go
into scores that nobody asks for. The closed loop says so when it finds an engine that much slower after all."""


def asked_ratios(run: Run, predictor: Predictor, folder: Path) -> tuple[float, ...]:
    """The share of the dense latency to search for, per budget; 1 only where no measurement will contradict.

    Where engines are measured it is where the closed loop will aim: what is trained then is what ships. A budget in
    time is held against what the dense engine takes here: a profile may come from a faster machine, or hour, and knows
    no percentile.
    """
    ratios, closed = [], run.closed
    for budget in run.budgets:
        dense_ms = _dense_ms(run, budget, folder) if closed and budget.latency_ms is not None else predictor.dense_ms
        asked = budget.target_ratio(dense_ms)
        decided = budget.speedup == 1 or not closed or asked >= FAR_INSIDE
        ratios.append(min(1.0, asked) if decided else min(NEARLY_DENSE, asked / AIM))
    return tuple(ratios)


def _dense_ms(run: Run, budget: Budget, folder: Path) -> float:
    """What the dense engine takes, at the percentile that all budgets of a run have; measured once."""
    log = MeasurementLog(folder / "measurements.jsonl")
    dense = run.subject.groups.dense()

    def take() -> dict[str, Any]:
        with meter(run) as timed:
            return time_structure(timed, dense, budget)

    dense_ms: float = log.measure("search", dense.digest(), run.target.name, take).value["dense_ms"]
    return dense_ms


def search_context(run: Run, folder: Path | None = None) -> SearchContext:
    """What the search of a run is given.

    Args:
        run: The run.
        folder: Where the search keeps its checkpoint and measurements; None: what a finished one was given.
    """
    predictor = stage_model(run)
    return SearchContext(
        network=run.subject.with_state(run.dense_state()),
        data=run.subject.data,
        groups=run.subject.groups,
        operators=run.subject.operators,
        predictor=predictor,
        step=predictor.step,
        ratios=asked_ratios(run, predictor, folder or run.space.folder("search")),
        config=run.config,
        checkpoint=Checkpoint(None if folder is None else folder / "search.ckpt"),
        progress=run.ui.step,
    )


def run_search(run: Run, folder: Path) -> None:
    """Scores every unit: PASS or a baseline."""
    context = search_context(run, folder)
    if all(ratio >= 1 for ratio in context.ratios):
        how = "is already" if run.closed or run.budgets[0].speedup == 1 else "is predicted to be"
        run.ui.say(f"The dense engine {how} inside the budget: nothing is pruned.")
        uniform = {name: torch.ones(units, dtype=torch.float64) for name, units in run.subject.groups.units.items()}
        result = SearchResult([uniform] * len(context.ratios), "uniform", run.dense_state())
    else:
        result = get_method(run.config.method)(context)
    result.ratios = list(context.ratios)
    result.save(folder)
