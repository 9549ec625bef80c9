"""PASS as published (arXiv 2407.17412): prompt, encoder, LSTM, statistics and previous mask; nothing of ours.

Weights are frozen during the search, one threshold goes over all scores, the target holds from the first step, the loss
is the task's alone and reaches the scores straight through the masks, and blocks stay. The previous mask is seen as a
constant, as everywhere here. Budget, rounding, closed loop and fine-tuning are the same as for every method.
"""

from __future__ import annotations

from typing import Any

from passdeploy.search.baselines.variants import changed
from passdeploy.search.method import SearchContext, SearchResult, register_method
from passdeploy.search.trainer import search_pass

PAPER: dict[str, Any] = {
    "co_adapt": False,
    "prior": "none",
    "depth": False,
    "allocator": "global",
    "signal": "gradient",
    "latency_weight": 0.0,
    "distill": 0.0,
    "ramp": 0.0,
    "resolve_every": 1,
    "hyper_every": 1,
}


@register_method("pass-paper")
def paper(context: SearchContext) -> SearchResult:
    """The published method."""
    return search_pass(changed(context, **PAPER))
