"""The search: scores for every unit, by PASS or a baseline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from passdeploy.checkpoint import Checkpoint
from passdeploy.latency.loop import AIM
from passdeploy.search.method import SearchContext, SearchResult, get_method
from passdeploy.stages.profile import Predictor, stage_model

if TYPE_CHECKING:
    from passdeploy.pipeline import Run


NEARLY_DENSE = 0.95
"""Share of the dense latency that is searched for where a model of measurements says that the dense engine is inside
already: the measurement that decides may say otherwise, and then the scores are needed."""


def asked_ratios(run: Run, predictor: Predictor) -> tuple[float, ...]:
    """The share of the dense latency to search for, per budget; 1 only where no measurement can contradict.

    Where engines are measured it is where the closed loop will aim: what is trained then is what ships.
    """
    ratios, closed = [], run.closed
    for budget in run.budgets:
        decided = budget.speedup == 1 or not closed
        asked = budget.target_ratio(predictor.dense_ms)
        ratios.append(min(1.0, asked) if decided else min(NEARLY_DENSE, asked / AIM))
    return tuple(ratios)


def search_context(run: Run, checkpoint: Checkpoint | None = None) -> SearchContext:
    """What the search of a run is given."""
    predictor = stage_model(run)
    return SearchContext(
        network=run.subject.with_state(run.dense_state()),
        data=run.subject.data,
        groups=run.subject.groups,
        operators=run.subject.operators,
        predictor=predictor,
        step=predictor.step,
        ratios=asked_ratios(run, predictor),
        config=run.config,
        checkpoint=checkpoint or Checkpoint(None),
        progress=run.ui.step,
    )


def run_search(run: Run, folder: Path) -> None:
    """Scores every unit: PASS or a baseline."""
    context = search_context(run, Checkpoint(folder / "search.ckpt"))
    if all(ratio >= 1 for ratio in context.ratios):
        run.ui.say("The dense engine is already inside the budget: nothing is pruned.")
        uniform = {name: torch.ones(units, dtype=torch.float64) for name, units in run.subject.groups.units.items()}
        result = SearchResult([uniform] * len(context.ratios), "uniform", run.dense_state())
    else:
        result = get_method(run.config.method)(context)
    result.save(folder)
