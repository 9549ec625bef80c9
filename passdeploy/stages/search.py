"""The search: scores for every unit, by PASS or a baseline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from passdeploy.search.method import SearchContext, SearchResult, get_method
from passdeploy.stages.profile import stage_model
from passdeploy.training import Checkpoint

if TYPE_CHECKING:
    from passdeploy.pipeline import Run


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
        ratios=tuple(min(1.0, budget.target_ratio(predictor.dense_ms)) for budget in run.budgets),
        config=run.config,
        checkpoint=checkpoint or Checkpoint(None),
        progress=run.ui.step,
    )


def run_search(run: Run, folder: Path) -> None:
    """Scores every unit: PASS or a baseline."""
    context = search_context(run, Checkpoint(folder / "search.ckpt"))
    if all(ratio >= 1 for ratio in context.ratios):
        dense_ms = stage_model(run).dense_ms
        run.ui.say(f"The dense engine is already inside the budget ({dense_ms:.4g} ms): nothing is pruned.")
        uniform = {name: torch.ones(units, dtype=torch.float64) for name, units in run.subject.groups.units.items()}
        result = SearchResult([uniform] * len(context.ratios), "uniform", run.dense_state())
    else:
        result = get_method(run.config.method)(context)
    result.save(folder)
