"""Joint width and depth after MDP (Sun et al., arXiv 2504.02168); written from the paper.

The same knapsack as for HALP, in which a whole block may go as well: with it go the importances of all its channels.
The paper solves a mixed-integer programme whose latency is bilinear in neighbouring widths; here it is linearised.
"""

from __future__ import annotations

import torch

from passdeploy.search.baselines.gradients import taylor
from passdeploy.search.method import SearchContext, SearchResult, constant_result, register_method


@register_method("mdp", trains=False)
def mdp(context: SearchContext) -> SearchResult:
    """Taylor importance, knapsack over widths and blocks."""
    importance = taylor(context)
    channels = {group.name for group in context.groups.groups if group.kind == "channel"}
    for group in context.groups.groups:
        if group.kind == "depth":
            # a block inside of it is its channels, which are counted already
            inner = [importance[name].sum() for name in context.groups.inner(group) if name in channels]
            importance[group.name] = torch.stack(inner).sum()[None] if inner else importance[group.name]
    return constant_result(context, importance, "knapsack", depth=True)
