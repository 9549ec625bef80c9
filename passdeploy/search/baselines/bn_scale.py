"""Scale factors of the batch norms (Network Slimming, arXiv 1708.06519), without its sparsity training."""

from __future__ import annotations

import torch

from passdeploy.search.baselines.l1 import filter_norms
from passdeploy.search.baselines.magnitudes import blocks_last, slices
from passdeploy.search.method import SearchContext, SearchResult, constant_result, register_method


@register_method("bn-scale", trains=False)
def bn_scale(context: SearchContext) -> SearchResult:
    """|gamma|, one threshold over all; groups without a norm take part with their L1 norms around the mean |gamma|."""
    scales = {}
    for group in context.groups.groups:
        if group.kind == "channel":
            found = [values.abs().mean(1) for _, is_norm, values in slices(context.network, group) if is_norm]
            if found:
                scales[group.name] = torch.stack(found).mean(0)
    middle = float(torch.cat(list(scales.values())).mean()) if scales else 1.0
    scores = {name: scales.get(name, norms * middle) for name, norms in filter_norms(context).items()}
    return constant_result(context, blocks_last(scores, context.groups), "global")
