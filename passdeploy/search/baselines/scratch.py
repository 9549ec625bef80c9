"""The small network trained from scratch (Liu et al., arXiv 1810.05270): is any of the dense network worth keeping?"""

from __future__ import annotations

import copy

import torch
from torch import nn

from passdeploy.search.baselines.magnitudes import blocks_last
from passdeploy.search.method import SearchContext, SearchResult, constant_result, register_method


def reinitialised(network: nn.Module, seed: int) -> nn.Module:
    """A copy with fresh weights: He initialisation for convolutions, each other module's own where it has one."""
    fresh = copy.deepcopy(network)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in fresh.modules():
            reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
            if isinstance(module, nn.modules.conv._ConvNd):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif callable(reset):
                reset()
            else:  # parameters that a module holds itself: class tokens, position embeddings, layer scales
                for parameter in module.parameters(recurse=False):
                    if parameter.ndim > 1:
                        nn.init.trunc_normal_(parameter, std=0.02)
    return fresh


@register_method("scratch", trains=False)
def scratch(context: SearchContext) -> SearchResult:
    """Uniform widths, fresh weights, and all the training steps that the others have for search and fine-tuning."""
    groups = context.groups
    first = {g.name: 2.0 - torch.arange(g.units) / g.units for g in groups.groups if g.kind == "channel"}
    result = constant_result(context, blocks_last(first, groups), "uniform")
    result.network = dict(reinitialised(context.network, context.config.seed).state_dict())
    return result
