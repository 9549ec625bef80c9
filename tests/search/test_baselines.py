"""Every method behind one interface: it scores all units, its allocator meets the budget, and it costs the same."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from passdeploy.config import make_config
from passdeploy.data.base import ArraySplit, Augmentation, ImageData, Preprocess
from passdeploy.errors import BadInput
from passdeploy.groups import ChannelGroup, Groups, Member, find_groups, operators
from passdeploy.latency.roofline import Roofline
from passdeploy.models.cifar_resnet import CifarResNet
from passdeploy.search.baselines.gradients import taylor
from passdeploy.search.baselines.scratch import reinitialised
from passdeploy.search.baselines.variants import changed
from passdeploy.search.knapsack import BUCKETS, COMBINATIONS, KnapsackAllocator, _multiple_choice
from passdeploy.search.method import SearchContext, get_method, methods, search_steps
from passdeploy.structure import Structure
from passdeploy.targets import Target

TARGET = Target("cpu", "a CPU", None, "onnxruntime", "fp32", 1, 1, attached=False)
SIZE = (16, 16)
WIDTH_ONLY = ("random", "uniform", "l1", "bn-scale", "taylor", "groupnorm", "halp", "scratch")
SEARCHING = ("pass", "pass-paper", "pass-no-prompt", "pass-no-recurrence", "pass-no-statistics")
JOINT = ("mdp", "sensitivity")
RATIO = 0.75


def images() -> ImageData:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(96) % 3
    pixels = torch.randint(0, 120, (96, 3, *SIZE), generator=generator) + 60 * labels[:, None, None, None]
    split = ArraySplit(pixels.to(torch.uint8), labels)
    return ImageData("made-up", ("a", "b", "c"), Preprocess(SIZE), Augmentation(flip=False), split, split, split)


@pytest.fixture(scope="module")
def context() -> SearchContext:
    torch.manual_seed(0)
    network = CifarResNet((2, 1, 1), 3, (8, 16, 16)).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.3, 1.5)
    example = torch.zeros(2, 3, *SIZE)
    groups = find_groups(network, example)
    ops = operators(network, example[:1], groups)
    search = {"epochs": 0.01, "min_steps": 4, "resolve_every": 2}
    config = make_config({"model": "m", "data": "d", "train_batch": 16, "search": search})
    predictor = Roofline(ops, list(groups.units.values()), TARGET)
    return SearchContext(network, images(), groups, ops, predictor, 4, (RATIO,), config)


def test_all_baselines_of_the_design_are_registered() -> None:
    assert {*WIDTH_ONLY, *SEARCHING, *JOINT} <= set(methods())


def test_unknown_method_names_the_nearest() -> None:
    with pytest.raises(BadInput, match=r"did you mean.*taylor"):
        get_method("tailor")


@pytest.mark.parametrize("name", [*WIDTH_ONLY, *SEARCHING, *JOINT])
def test_scores_meet_the_budget_through_their_allocator(context: SearchContext, name: str) -> None:
    before = {key: value.clone() for key, value in context.network.state_dict().items()}
    result = get_method(name)(context)
    for key, value in context.network.state_dict().items():
        assert torch.equal(value, before[key]), f"{name} changed the network it was given"
    (importance,) = result.importance
    for group in context.groups.groups:
        values = importance[group.name]
        assert values.shape == (group.units,)
        assert torch.isfinite(values).all() and (values > 0).all()
    settings = context.config.search.model_copy(update={"depth": result.depth})
    allowed = SearchContext(**{**vars(context), "config": context.config.model_copy(update={"search": settings})})
    allocator = allowed.allocator(result.allocator)
    found = allocator.solve(result.importance_arrays(0), RATIO * allocator.dense_ms)
    assert found is not None
    assert found.predicted_ms <= RATIO * allocator.dense_ms
    assert isinstance(found.structure, Structure)
    assert found.structure.widths() != context.groups.units
    blocks = [sum(found.structure.masks[g.name]) for g in context.groups.groups if g.kind == "depth"]
    if name in (*WIDTH_ONLY, "pass-paper"):
        assert all(blocks), "a method that prunes width only removed a block"
        assert all(allocator.fastest()[allocator.depth])


@pytest.mark.parametrize("name", [*WIDTH_ONLY, *JOINT])
def test_what_a_search_would_cost_is_left_for_fine_tuning(context: SearchContext, name: str) -> None:
    assert get_method(name)(context).unspent_steps == search_steps(context) == 4


@pytest.mark.parametrize("name", SEARCHING)
def test_a_search_leaves_nothing(context: SearchContext, name: str) -> None:
    assert get_method(name)(context).unspent_steps == 0


@pytest.mark.parametrize("name", ["random", "scratch", "pass-paper", "pass"])
def test_same_seed_same_result(context: SearchContext, name: str) -> None:
    a, b = get_method(name)(context), get_method(name)(context)
    for group in context.groups.names:
        assert torch.equal(a.importance[0][group], b.importance[0][group])
    assert all(torch.equal(a.network[key], b.network[key]) for key in a.network)
    other = context.config.model_copy(update={"seed": 1})
    c = get_method(name)(SearchContext(**{**vars(context), "config": other}))
    assert any(not torch.equal(a.importance[0][group], c.importance[0][group]) for group in context.groups.names) or (
        any(not torch.equal(a.network[key], c.network[key]) for key in a.network)
    )


def test_gradients_take_no_more_images_at_once_than_training(context: SearchContext) -> None:
    """Where memory is short `train_batch` is lowered; what is found is the same."""
    sizes: list[int] = []
    network = copy.deepcopy(context.network)
    network.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))

    def scored(train_batch: int) -> dict[str, torch.Tensor]:
        config = context.config.model_copy(update={"train_batch": train_batch})
        return taylor(SearchContext(**{**vars(context), "network": network, "config": config}))

    whole = scored(128)
    assert sizes == [64, 32]
    sizes.clear()
    few = scored(24)
    assert sizes == [24, 24, 16, 24, 8]
    for name, values in whole.items():
        assert torch.allclose(few[name], values, rtol=1e-3, atol=1e-12), name


def test_paper_leaves_the_weights_alone_and_pass_does_not(context: SearchContext) -> None:
    weights = dict(context.network.named_parameters())
    frozen, adapted = get_method("pass-paper")(context).network, get_method("pass")(context).network
    assert all(torch.equal(frozen[name], value) for name, value in weights.items())
    assert any(not torch.equal(adapted[name], value) for name, value in weights.items())


def test_paper_starts_from_scores_that_differ(context: SearchContext) -> None:
    scores = get_method("pass-paper")(context).importance[0]
    assert all(len(values.unique()) > 1 for values in scores.values() if len(values) > 1)


def test_papers_scores_stay_numbers_however_far_they_are_driven(context: SearchContext) -> None:
    """Nothing bounds them, and importances are their exponentials."""
    far = changed(context, hyper_lr=100.0, min_steps=8)
    for values in get_method("pass-paper")(far).importance[0].values():
        assert torch.isfinite(values).all() and (values > 0).all()


def test_without_prompt_nothing_is_added_to_the_image(context: SearchContext) -> None:
    assert get_method("pass-no-prompt")(context).stage == {}
    assert set(get_method("pass")(context).stage) == {"prompt"}


def test_scratch_starts_from_fresh_weights(context: SearchContext) -> None:
    fresh = reinitialised(context.network, 0)
    for name, module in fresh.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert torch.equal(module.weight, torch.ones_like(module.weight)) and (module.running_mean == 0).all()
        if isinstance(module, torch.nn.Conv2d):
            assert not torch.equal(module.weight, context.network.get_submodule(name).weight)


def test_scratch_forgets_attention_as_well() -> None:
    attention = torch.nn.MultiheadAttention(8, 2)
    torch.nn.init.constant_(attention.in_proj_bias, 3.0)
    assert (reinitialised(attention, 0).in_proj_bias == 0).all()  # type: ignore[attr-defined]


def _enumerate(losses: list[np.ndarray], weights: list[np.ndarray]) -> float:
    import itertools

    best = np.inf
    for choice in itertools.product(*[range(len(loss)) for loss in losses]):
        if sum(np.ceil(w[i] - 1e-9) for w, i in zip(weights, choice, strict=True)) <= BUCKETS:
            best = min(best, sum(loss[i] for loss, i in zip(losses, choice, strict=True)))
    return best


@pytest.mark.parametrize("seed", range(5))
def test_knapsack_finds_the_optimum(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, 5, size=5)
    losses = [rng.random(n) for n in sizes]
    weights = [np.concatenate([[0.0], rng.random(n - 1) * BUCKETS]) for n in sizes]
    chosen = _multiple_choice(losses, weights)
    assert sum(np.ceil(w[i] - 1e-9) for w, i in zip(weights, chosen, strict=True)) <= BUCKETS
    assert sum(loss[i] for loss, i in zip(losses, chosen, strict=True)) == pytest.approx(_enumerate(losses, weights))


@pytest.mark.parametrize("far", [1e30, np.inf])
def test_knapsack_without_room_takes_what_weighs_nothing(far: float) -> None:
    """A target that lies a rounding error above the fastest: every other option weighs more than an integer holds."""
    assert _multiple_choice([np.array([3.0, 1.0, 0.0])] * 2, [np.array([0.0, far, far])] * 2) == [0, 0]


def test_knapsack_trades_width_against_depth(context: SearchContext) -> None:
    """Blocks whose channels matter little go; where they matter most they stay."""
    allocator = context.allocator("knapsack")
    assert isinstance(allocator, KnapsackAllocator)
    groups = context.groups
    inside = {name for depth in groups.groups if depth.kind == "depth" for name in groups.inner(depth)}
    # What the channels outside the block can save without it: reachable by width alone.
    thin = np.array(
        [
            full if group.kind == "depth" or group.name in inside else grid[0]
            for group, full, grid in zip(groups.groups, allocator.full, allocator.grids, strict=True)
        ]
    )
    target_ms = 1.01 * float(allocator.predict(thin[None])[0])
    for cheap in (True, False):
        importance = {}
        for group in groups.groups:
            low = group.kind == "depth" or group.name in inside
            importance[group.name] = np.full(group.units, 1e-6 if low == cheap else 10.0)
        found = allocator.solve(importance, target_ms)
        assert found is not None
        gone = [
            group.name for group in groups.groups if group.kind == "depth" and not found.structure.masks[group.name][0]
        ]
        assert bool(gone) == cheap


@pytest.mark.parametrize("levels", [3, 16, 70])
def test_a_block_is_narrowed_where_that_is_cheap(levels: int) -> None:
    """Of two groups in a block one matters and the other does not: they need not have the same share."""
    units = 4 * levels
    layers = [Member(name, "out", tuple((i,) for i in range(units)), units) for name in ("a", "b")]
    groups = Groups(
        (
            ChannelGroup("depth:block", "depth", 1, branch=("a", "b", "c"), gate="c"),
            *(ChannelGroup(layer.module, "channel", units, (layer,)) for layer in layers),
        )
    )

    class Sum:
        def predict_many(self, widths: np.ndarray) -> np.ndarray:
            return 1 + widths[:, 0] * widths[:, 1:].sum(1) / units

    grid = 4 * np.arange(1, levels + 1)
    allocator = KnapsackAllocator(groups, Sum(), [np.array([0, 1]), grid, grid])
    options = allocator.items()[0]
    assert len(options) <= 1 + COMBINATIONS + levels
    assert {tuple(option.values()) for option in options} >= {
        (1, 4, 4),
        (1, 4, units),
        (1, units, 4),
        (1, units, units),
    }
    importance = {"depth:block": np.ones(1), "a": np.full(units, 1e-6), "b": np.full(units, 1.0)}
    found = allocator.solve(importance, 2.4)
    assert found is not None
    assert found.widths[2] == units
    assert found.widths[1] <= 0.4 * units


def test_a_block_is_worth_its_channels_once(context: SearchContext, monkeypatch: pytest.MonkeyPatch) -> None:
    """In MDP, whatever blocks it has inside."""
    layers = [Member(name, "out", tuple((i,) for i in range(4)), 4) for name in ("a", "b")]
    blocks = [
        ChannelGroup("depth:outer", "depth", 1, branch=("a", "b", "c"), gate="c"),
        ChannelGroup("depth:nested", "depth", 1, branch=("b",), gate="b"),
    ]
    groups = Groups((*blocks, *(ChannelGroup(layer.module, "channel", 4, (layer,)) for layer in layers)))
    ones = {name: torch.ones(units, dtype=torch.float64) for name, units in groups.units.items()}
    monkeypatch.setattr("passdeploy.search.baselines.mdp.taylor", lambda _: dict(ones))
    (importance,) = get_method("mdp")(SearchContext(**{**vars(context), "groups": groups})).importance
    assert (float(importance["depth:outer"]), float(importance["depth:nested"])) == (8.0, 4.0)


def test_knapsack_says_when_nothing_is_that_fast(context: SearchContext) -> None:
    allocator = context.allocator("knapsack")
    importance = {name: np.ones(units) for name, units in context.groups.units.items()}
    assert allocator.solve(importance, 1e-9) is None
