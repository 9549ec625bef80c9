"""Latency-saliency knapsack after HALP (Shen et al., arXiv 2110.10811); written from the paper.

Taylor importance of every unit against the latency that its group's width costs on the target; blocks stay.
"""

from __future__ import annotations

from passdeploy.search.baselines.gradients import taylor
from passdeploy.search.baselines.magnitudes import blocks_last
from passdeploy.search.method import SearchContext, SearchResult, constant_result, register_method


@register_method("halp", trains=False)
def halp(context: SearchContext) -> SearchResult:
    """Taylor importance, knapsack over widths."""
    return constant_result(context, blocks_last(taylor(context), context.groups), "knapsack")
