"""First-order Taylor importance with one threshold over all units (Molchanov et al., arXiv 1906.10771)."""

from __future__ import annotations

from passdeploy.search.baselines.gradients import taylor
from passdeploy.search.baselines.magnitudes import blocks_last
from passdeploy.search.method import SearchContext, SearchResult, constant_result, register_method


@register_method("taylor", trains=False)
def taylor_global(context: SearchContext) -> SearchResult:
    """Global Taylor ranking; blocks stay."""
    return constant_result(context, blocks_last(taylor(context), context.groups), "global")
