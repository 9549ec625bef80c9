"""L1 norm of the filters (Li et al., arXiv 1608.08710), each group scaled to mean 1, one threshold over all."""

from __future__ import annotations

import torch
from torch import Tensor

from passdeploy.search.baselines.magnitudes import blocks_last, scaled, slices
from passdeploy.search.method import SearchContext, SearchResult, constant_result, register_method


def filter_norms(context: SearchContext) -> dict[str, Tensor]:
    """Per channel group (units,): mean L1 norm of the filters that produce a unit, each layer scaled to mean 1."""
    norms = {}
    for group in context.groups.groups:
        if group.kind == "channel":
            found = [
                scaled(values.abs().mean(1))
                for side, is_norm, values in slices(context.network, group)
                if side == "out" and not is_norm
            ]
            norms[group.name] = torch.stack(found).mean(0) if found else torch.ones(group.units)
    return norms


@register_method("l1", trains=False)
def l1(context: SearchContext) -> SearchResult:
    """Global L1 ranking."""
    return constant_result(context, blocks_last(filter_norms(context), context.groups), "global")
