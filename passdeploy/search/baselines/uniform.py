"""The same share of every group, the units with the smallest filters first: what most people do."""

from __future__ import annotations

from passdeploy.search.baselines.l1 import filter_norms
from passdeploy.search.baselines.magnitudes import blocks_last
from passdeploy.search.method import SearchContext, SearchResult, constant_result, register_method


@register_method("uniform", trains=False)
def uniform(context: SearchContext) -> SearchResult:
    """L1 inside a group, the same share everywhere."""
    return constant_result(context, blocks_last(filter_norms(context), context.groups), "uniform")
