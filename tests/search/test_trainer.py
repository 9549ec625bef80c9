"""How PASS's training treats several budgets, and settings that leave little to train."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch

from passdeploy.errors import BadInput
from passdeploy.search.baselines.variants import changed
from passdeploy.search.hypernetwork import HyperNetwork
from passdeploy.search.method import SearchContext
from passdeploy.search.prompt import InputStage
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


def test_a_prompt_whose_gradient_is_no_number_is_named(context: SearchContext, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the last step, too: the loss is a number then, and the prompt would not be."""
    images = InputStage.forward

    def steep(self: InputStage, given: torch.Tensor) -> torch.Tensor:
        steeply = 0 if self.prompt is None else (self.prompt.sum() * 0).abs().sqrt()  # the teacher has none
        return images(self, given) + steeply

    monkeypatch.setattr(InputStage, "forward", steep)
    with pytest.raises(BadInput, match=r"the norm of the prompt's gradient is nan at step 1; lower"):
        search_pass(changed(context, min_steps=1))


def test_every_budget_has_its_own_curve_and_progress(context: SearchContext) -> None:
    """As many points in all as a single budget has, so that even the shortest training shows whether it settles."""
    ratios, said = (0.9, 0.8, 0.6), []
    more = dataclasses.replace(context, ratios=ratios, progress=lambda *line: said.append(line))
    found = search_pass(changed(more, min_steps=90, ramp=0.5))
    budgets, asked = found.curves["budget"], found.curves["asked_ratio"]
    assert [budgets.count(which) for which in range(3)] == [4, 4, 4]
    assert [asked[budgets.index(which) :: 3][-1] for which in range(3)] == list(ratios)
    at = [i for i, budget in enumerate(budgets) if budget == 2]
    for step, _total, line in said[-90:]:  # those before are of the sensitivities
        own = [
            found.curves["loss"][i]
            for i, s in enumerate(found.curves["step"])
            if s <= step and budgets[i] == (step - 1) % 3
        ]
        assert line.split(",")[0] == (f"loss {own[-1]:.3f}" if own else "")
    settles = next(check for check in found.health if check["name"] == "loss settles")
    last = [found.curves["loss"][i] for i in at if asked[i] == 0.6]
    assert len(last) > 1 and f"from {last[0]:.3f} to {last[-1]:.3f}" in settles["message"]


def test_fewer_steps_than_budgets(context: SearchContext) -> None:
    """The tightest gets none."""
    assert search_pass(changed(dataclasses.replace(context, ratios=(0.9, 0.8, 0.6)), min_steps=2)).health


def test_a_report_shows_the_curve_of_its_own_budget() -> None:
    from passdeploy.assemble import _curves

    keys = ("step", "loss", "accuracy", "latency_ratio", "blocks")
    curves: dict[str, list[float]] = {key: [1, 2, 3, 4] for key in keys}
    old = _curves({"curves": curves}, None, 1).search
    one = _curves({"curves": curves | {"budget": [0, 1, 0, 1]}}, None, 1).search
    assert old is not None and old.step == [1, 2, 3, 4]
    assert one is not None and one.step == [2, 4] and one.series["kept_blocks"] == [2, 4]
    assert _curves({"curves": {}}, None, 1).search is None
