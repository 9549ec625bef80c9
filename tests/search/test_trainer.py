"""How PASS's training treats several budgets, and settings that leave little to train."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch

from passdeploy.search.baselines.variants import changed
from passdeploy.search.hypernetwork import HyperNetwork
from passdeploy.search.method import SearchContext
from passdeploy.search.trainer import search_pass
from tests.search import test_baselines

context = test_baselines.context


@pytest.mark.parametrize("budgets", [1, 2, 3, 4])
def test_the_hypernetwork_learns_under_every_budget(
    context: SearchContext, monkeypatch: pytest.MonkeyPatch, budgets: int
) -> None:
    ratios = tuple(0.9 - 0.1 * n for n in range(budgets))
    learnt: Counter[float] = Counter()
    forward = HyperNetwork.forward

    def watched(self: HyperNetwork, *args: Any) -> Any:
        if torch.is_grad_enabled():
            learnt[args[-1]] += 1
        return forward(self, *args)

    monkeypatch.setattr(HyperNetwork, "forward", watched)
    search = {"min_steps": 4 * budgets, "hyper_every": 2, "ramp": 0.0}
    search_pass(changed(dataclasses.replace(context, ratios=ratios), **search))
    assert learnt == dict.fromkeys(ratios, 2)


@pytest.mark.parametrize("ratios", [(0.6,), (0.9, 0.6), (0.9, 0.8, 0.7, 0.6)])
def test_masks_are_at_the_budget_when_it_has_tightened(context: SearchContext, ratios: tuple[float, ...]) -> None:
    """However few steps a budget gets, and however rarely the allocation is solved again."""
    search = {"min_steps": 20, "resolve_every": 100, "ramp": 0.5}
    found = search_pass(changed(dataclasses.replace(context, ratios=ratios), **search))
    last = ratios[19 % len(ratios)]
    assert found.curves["asked_ratio"][-1] == last
    assert found.curves["latency_ratio"][-1] <= last


def test_frozen_weights_without_a_prompt_leave_the_hypernetwork(context: SearchContext) -> None:
    found = search_pass(changed(context, prompt={"kind": "none"}, co_adapt=False, hyper_every=3))
    for name, value in context.network.named_parameters():
        assert torch.equal(value.detach(), found.network[name])
