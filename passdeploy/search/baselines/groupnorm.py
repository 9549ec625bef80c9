"""DepGraph's group norm (Fang et al., arXiv 2301.12900): squared L2 norm of all that goes with a unit."""

from __future__ import annotations

import torch

from passdeploy.search.baselines.magnitudes import blocks_last, scaled, slices
from passdeploy.search.method import SearchContext, SearchResult, constant_result, register_method


@register_method("groupnorm", trains=False)
def groupnorm(context: SearchContext) -> SearchResult:
    """Producers, norms and consumers together; each group scaled to mean 1, one threshold over all."""
    scores = {}
    for group in context.groups.groups:
        if group.kind == "channel":
            norms = [values.square().sum(1) for _, _, values in slices(context.network, group)]
            scores[group.name] = scaled(torch.stack(norms).mean(0)) if norms else torch.ones(group.units)
    return constant_result(context, blocks_last(scores, context.groups), "global")
