"""Random units, one threshold over all: what any choice has to beat."""

from __future__ import annotations

import torch

from passdeploy.search.baselines.magnitudes import blocks_last
from passdeploy.search.method import SearchContext, SearchResult, constant_result, register_method


@register_method("random", trains=False)
def random(context: SearchContext) -> SearchResult:
    """Scores drawn from the seed."""
    generator = torch.Generator().manual_seed(context.config.seed * 6151 + 5)
    groups = context.groups
    scores = {g.name: torch.rand(g.units, generator=generator) for g in groups.groups if g.kind == "channel"}
    return constant_result(context, blocks_last(scores, groups), "global")
