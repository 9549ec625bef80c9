"""Studies: their arithmetic exactly, and two of them for real on an engine of scripted latency."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch

from passdeploy import cli
from passdeploy.compare.plot import tradeoff
from passdeploy.compare.runner import Arm, Outcome, Plan, run_label
from passdeploy.compare.statistics import Mean
from passdeploy.config import RunConfig, make_config
from passdeploy.data.base import Preprocess, ResizedSplit
from passdeploy.errors import BadInput, PassdeployError
from passdeploy.groups import find_groups
from passdeploy.search.hypernetwork import Cuts, HyperNetwork
from passdeploy.search.method import SearchContext, SearchResult, methods
from passdeploy.search.trainer import search_pass
from passdeploy.study import nets
from passdeploy.study.ablation import ALONE, PARTS
from passdeploy.study.base import Findings, differences, get_study, points, standalone, studies
from passdeploy.study.command import study
from passdeploy.study.content import moves, ranks, spearman, within_groups
from passdeploy.study.halves import halves
from passdeploy.study.prompts import arms
from passdeploy.study.transfer import _methods_of
from passdeploy.study.vit import transformer
from passdeploy.subject import load_subject
from passdeploy.workspace import Workspace
from tests import scripted
from tests.data.test_fashion_mnist import needs_data
from tests.search import test_baselines
from tests.test_compare import CONFIG, ROW

pytestmark = pytest.mark.usefixtures("exported_once")


def test_all_six_are_there_and_others_are_refused() -> None:
    assert list(studies()) == ["ablation", "markov", "prompt-content", "prompts", "transfer", "vit"]
    with pytest.raises(BadInput, match="did you mean ablation"):
        get_study("ablations")


def test_small_runs_are_for_where_nothing_else_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import yaml

    asked: list[RunConfig] = []

    def run(name: str, config: RunConfig, *_: object, command: str, **__: object) -> tuple[Findings, Path]:
        assert command == "passdeploy study ablation --json"
        asked.append(config)
        return Findings("", [], []), tmp_path

    monkeypatch.setattr("passdeploy.study.command.study", run)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["passdeploy", "study", "ablation", "--json"])
    for said in ({}, {"latency": "4x", "epochs": 3.0, "search": {"epochs": 2.0}}):
        if said:
            (tmp_path / "passdeploy.yaml").write_text(yaml.safe_dump(said))
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code, capsys.readouterr().err
    small, own = asked
    assert (small.latency, small.epochs, small.search.epochs) == (("2x", "3x"), 1.0, 0.5)
    assert (own.latency, own.epochs, own.search.epochs) == (("4x",), 3.0, 2.0)


def test_a_difference_in_words() -> None:
    assert points(Mean(-0.004, None, 1)) == "-0.40 points"
    assert points(Mean(-0.004, 0.003, 3)) == "-0.40 points (95 %: -0.70 to -0.10; worse)"
    assert points(Mean(0.004, 0.003, 3)).endswith("better)")
    assert points(Mean(0.002, 0.003, 3)).endswith("no difference that 3 seeds can show)")


def test_one_seed_is_called_a_hint() -> None:
    rows = [ROW, replace(ROW, method="no depth", accuracy=0.88)]
    first, last = differences(rows, "pass")
    assert first == "no depth, against pass: -2.00 points at 2x."
    assert last.startswith("One seed")


def test_an_arm_that_missed_its_budget_is_named() -> None:
    rows = [ROW, replace(ROW, method="no depth", accuracy=None, status="infeasible")]
    assert differences(rows, "pass")[0] == "no depth, against pass: at 2x infeasible."


def test_an_arm_is_not_blamed_for_what_the_reference_lacks() -> None:
    rows = [replace(ROW, accuracy=None, status="infeasible"), replace(ROW, method="no depth", accuracy=0.9)]
    assert differences(rows, "pass")[0] == "no depth, against pass: at 2x nothing to compare with (pass: infeasible)."
    two = [
        replace(ROW, method="no depth", accuracy=None, status="infeasible"),
        replace(ROW, method="no depth", accuracy=0.9, seed=1),
        ROW,
        replace(ROW, accuracy=None, status="infeasible", seed=1),
    ]
    assert "(pass: 1 within budget, 1 infeasible)" in differences(two, "pass")[0]


def test_a_conclusion_says_which_engines_are_over_budget() -> None:
    rows = [ROW, replace(ROW, method="no depth", accuracy=0.92, status="over_budget")]
    assert differences(rows, "pass")[0].endswith("+2.00 points at 2x (engines over budget: 1 of no depth).")


def test_a_users_network_stands_for_its_own_name_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other networks of a study are the study's, and each one's dense accuracy is a mean, as what is lost is."""
    plans: list[Plan] = []

    def planned(plan: Plan, *_: object) -> Outcome:
        plans.append(plan)
        return Outcome([replace(ROW, seed=seed, dense_accuracy=0.91 + 0.02 * seed) for seed in (0, 1)], {})

    monkeypatch.setattr("passdeploy.study.base.run_plan", planned)
    own = scripted.tiny_resnet()
    config = make_config(CONFIG)
    found, _ = study("vit", config, "0,1", tmp_path / "vit", model=own, data=scripted.data())
    assert [plan.model for plan in plans] == [own, None]
    assert any("of 92.00 %" in said for said in found.conclusion)
    study("markov", config, "0,1", tmp_path / "markov", model=own, data=scripted.data())
    assert [plan.model for plan in plans[2:]] == [None, None]


def test_what_is_said_of_a_network_is_not_said_of_a_studys_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor are weights of one data set another's."""
    plans: list[Plan] = []

    def planned(plan: Plan, *_: object) -> Outcome:
        plans.append(plan)
        return Outcome([ROW], {})

    monkeypatch.setattr("passdeploy.study.base.run_plan", planned)
    monkeypatch.setattr("passdeploy.study.transfer._methods_of", lambda _: {})
    given = {**CONFIG, "weights": "w.safetensors", "groups": {"exclude": ["fc"]}}
    config = make_config(given)
    for name in ("vit", "markov"):
        study(name, config, "0", tmp_path / name, model=scripted.tiny_resnet, data=scripted.data())
    own = [plan.config for plan in plans if "passdeploy.study.nets" in str(plan.config.model)]
    assert len(own) == 3
    assert all((c.weights, c.groups, c.profile_file) == (None, RunConfig().groups, None) for c in own)
    plans.clear()
    config = make_config({**CONFIG, "weights": "w.safetensors"})
    monkeypatch.setattr("passdeploy.study.transfer.load_subject", lambda *_: SimpleNamespace(data=scripted.data()))
    monkeypatch.setattr("passdeploy.study.transfer.halves", lambda data: (data, data))
    for to, weights in ((None, [None, None]), ("stripes", ["w.safetensors", None])):
        study("transfer", config, "0", tmp_path / "t", model=scripted.tiny_resnet, data=scripted.data(), to=to)
        assert [plan.config.weights for plan in plans[-2:]] == weights
    with pytest.raises(BadInput, match="give a function that builds it"):
        study("transfer", config, "0", tmp_path / "t", model=scripted.tiny_resnet(), data=scripted.data())


def test_rank_correlation() -> None:
    assert list(ranks([3.0, 1.0, 3.0])) == [1.5, 0.0, 1.5]
    assert spearman([1, 2, 3, 4], [1, 4, 9, 16]) == pytest.approx(1.0)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1.0)
    assert spearman([1, 1, 1], [1, 2, 3]) is None
    a = {"x": torch.tensor([1.0, 2.0, 3.0]), "y": torch.arange(6.0)}
    b = {"x": torch.tensor([3.0, 2.0, 1.0]), "y": torch.arange(6.0)}
    assert within_groups(a, b) == pytest.approx((-3 + 6) / 9)


def test_halves_share_no_class_and_lose_no_image() -> None:
    data = scripted.data()
    with pytest.raises(BadInput, match="too few to halve"):
        halves(data)
    labels = torch.arange(40) % 5
    split = type(data.train)(torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1).repeat(1, 3, 4, 4), labels)
    first, second = halves(replace(data, classes=tuple("abcde"), train=split, val=split, test=split))
    assert (first.classes, second.classes) == (("a", "b"), ("c", "d", "e"))
    assert len(first.train) + len(second.train) == 40
    pixel = (second.train.images(torch.arange(len(second.train)))[:, 0, 0, 0] * 255).round().long()
    assert torch.equal(labels[pixel] - 2, second.train.labels)


def test_what_shows_many_classes_at_once_has_no_halves() -> None:
    data = scripted.data()
    split = type(data.train)(data.train.pixels, torch.zeros(len(data.train), *scripted.SIZE, dtype=torch.uint8))
    with pytest.raises(BadInput, match="name a second set with --to"):
        halves(replace(data, classes=tuple("abcde"), train=split, val=split, test=split))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"latency": "fastest", "min_accuracy": 0.5}, "study: takes budgets"),
        ({"axis": "macs", "latency": "2x,5ms"}, "--axis macs with --latency 2x,5ms"),
    ],
)
def test_budgets_that_no_arm_could_be_held_to_are_refused_at_once(
    tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(BadInput, match=said):
        study("ablation", make_config({**CONFIG, **settings}), "0", tmp_path, data=scripted.data())
    assert not any(tmp_path.iterdir())


def test_figures_stand_alone() -> None:
    figure = tradeoff([ROW, replace(ROW, method="l1", accuracy=0.8)], "test")
    assert figure is not None
    root = xml.etree.ElementTree.fromstring(standalone(figure))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"


@pytest.mark.parametrize("build", [nets.small_densenet, nets.small_unet, nets.small_vit])
def test_the_studies_networks_can_be_pruned(build: Any) -> None:
    network = build(7).eval()
    example = torch.randn(2, 3, 32, 32)
    assert network(example).shape == (2, 7)
    assert len(find_groups(network, example).groups) >= 5


@needs_data
def test_the_transformer_takes_the_default_data() -> None:
    subject = load_subject(transformer(make_config({"data": "fashion-mnist"})))
    assert subject.data.preprocess.size == subject.example.shape[-2:] == (32, 32)
    assert len(subject.groups.groups) >= 5


def test_memory_of_all_masks_sees_more_than_the_previous_one() -> None:
    """A change of the first group's mask reaches the third group's input only where all masks are remembered."""
    from passdeploy.search.statistics import GROUP_FEATURES, UNIT_FEATURES, Statistics

    sizes = (8, 4, 6)
    torch.manual_seed(0)
    statistics = Statistics(
        tuple(torch.randn(n, len(UNIT_FEATURES)) for n in sizes),
        torch.randn(3, len(GROUP_FEATURES)),
        tuple(torch.ones(n) for n in sizes),
    )
    prior = [torch.zeros(n) for n in sizes]

    def last(memory: str, first: float) -> torch.Tensor:
        torch.manual_seed(1)
        hyper = HyperNetwork(recurrence=False, reach=0.0, memory=memory)
        hard = (torch.full((8,), first), torch.ones(4), torch.ones(6))
        scores = hyper(torch.zeros(3, 8, 8), statistics, prior, Cuts(torch.zeros(3), hard), 0.5)[0]
        return scores[2] - scores[0].mean()  # what all share is taken out: against the first group's

    assert torch.allclose(last("previous", 1.0), last("previous", 0.0), atol=1e-6)
    assert not torch.allclose(last("all", 1.0), last("all", 0.0), atol=1e-4)


def test_ablation_leaves_out_what_the_design_names() -> None:
    named = {"no prompt", "no recurrence", "no statistics", "gradient signal", "global threshold", "no depth"}
    assert named <= set(PARTS)


def test_prompt_sizes_fit_the_image() -> None:
    for size in ((32, 32), (16, 12), (224, 224)):
        for arm in arms(size):
            prompt = arm.settings["prompt"]
            assert 2 * prompt["width"] < min(size)


def test_a_search_per_budget_lies_beside_the_others() -> None:
    own = [Arm(ALONE, "pass", latency=(budget,)) for budget in ("2x", "3x")]
    assert len({arm.folder for arm in (*own, Arm("pass", "pass"))}) == 3
    assert [run_label(arm, 0) for arm in own] == [f"{ALONE} 2x, seed 0", f"{ALONE} 3x, seed 0"]


def test_ablation_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in set(PARTS) - {"no depth"}:
        monkeypatch.delitem(PARTS, name)
    findings, page = study("ablation", make_config(CONFIG), "0", tmp_path, data=scripted.data())
    assert {row.method for row in findings.rows} == {"pass", "no depth"}
    text = page.read_text()
    assert "Run from Python with the configuration in `ablation.json`." in text
    assert "no depth, against pass" in text and "One seed" in text and "ablation.svg" in text
    numbers = json.loads((tmp_path / "ablation.json").read_text())
    assert len(numbers["rows"]) == 2 * 2 and numbers["seeds"] == [0]
    assert (tmp_path / "ablation.svg").is_file()


@pytest.mark.parametrize("more", [{}, {"weights": "w.pt"}, {"batch": 4}, {"prompt": {"kind": "none"}}, None])
def test_a_page_names_a_command_only_where_it_says_it_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, object] | None
) -> None:
    monkeypatch.setattr("passdeploy.study.base.run_plan", lambda *_: Outcome([ROW], {}))
    flags = {"model": "tiny-resnet", "data": "stripes", "latency": "1.3x", "search": {"epochs": 0.5}}
    data = scripted.data() if more is None else None
    _, page = study("ablation", make_config({**flags, "seed": 7, **(more or {})}), "0", tmp_path, data=data)
    said = (
        "Run with `passdeploy study ablation --model tiny-resnet --data stripes --target cpu --seeds 0 --latency 1.3x "
        "--epochs 2.25 --search-epochs 0.5`."
        if more == {}
        else "Run from Python with the configuration in `ablation.json`."
    )
    assert said in page.read_text()


def test_a_study_goes_on_without_what_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = {"no depth, seed 0": "training diverged"}
    monkeypatch.setattr("passdeploy.study.base.run_plan", lambda *_: Outcome([ROW], failed))
    findings, page = study(
        "ablation", make_config(CONFIG), "0", tmp_path, command="passdeploy study ablation --to 'a b'"
    )
    assert "Run with `passdeploy study ablation --to 'a b'`." in page.read_text()
    assert findings.failed == failed and "no depth, seed 0: training diverged" in page.read_text()
    monkeypatch.setattr("passdeploy.study.base.run_plan", lambda *_: Outcome([], failed))
    with pytest.raises(PassdeployError, match="no depth, seed 0: training diverged"):
        study("ablation", make_config(CONFIG), "0", tmp_path)


@pytest.mark.parametrize(
    ("name", "folder"), [("prompt-content", "pass/0"), ("transfer", "source/pass/0"), ("prompts", "cost")]
)
def test_a_study_with_other_settings_works_beside_its_earlier_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, folder: str
) -> None:
    opened: list[Path] = []

    def opening(*given: object, **_: object) -> NoReturn:
        opened.extend(item for item in given if isinstance(item, Path))
        raise KeyboardInterrupt

    monkeypatch.setattr("passdeploy.study.base.run_plan", lambda *_: Outcome([ROW], {}))
    for reader in ("content.Run", "transfer._methods_of", "prompts.Run"):
        monkeypatch.setattr(f"passdeploy.study.{reader}", opening)
    other = tmp_path / folder
    other.mkdir(parents=True)
    (other / "config.yaml").write_text(json.dumps(make_config({**CONFIG, "train_batch": 16}).to_json()))
    with pytest.raises(KeyboardInterrupt):
        study(name, make_config(CONFIG), "0", tmp_path, to="stripes", data=scripted.data())
    (found,) = opened
    assert found.parent == other.parent and found.name.startswith(f"{other.name}-")


context = test_baselines.context


def searched_on(size: tuple[int, int], context: SearchContext, folder: Path) -> SearchContext:
    """The same network on images of that size, and what a search found there, in `folder`."""
    split = ResizedSplit(context.data.train, size)
    data = replace(context.data, preprocess=Preprocess(size), train=split, val=split, test=split)
    there = replace(context, data=data)
    found = search_pass(there)
    Workspace(folder).run("search", {}, found.save)
    return there


def test_a_hypernetwork_is_used_on_images_of_another_size(context: SearchContext, tmp_path: Path) -> None:
    there = searched_on((12, 20), context, tmp_path)
    _, method = _methods_of(tmp_path)["its hypernetwork"]
    for used_on in (there, context):
        (importance,) = method(used_on).importance
        assert all(bool((values > 0).all()) for values in importance.values())


def test_where_nothing_was_searched_there_is_nothing_to_use(tmp_path: Path) -> None:
    ones = {"conv": torch.ones(4, dtype=torch.float64)}
    Workspace(tmp_path).run("search", {}, SearchResult([ones], "uniform", {"w": torch.ones(1)}).save)
    with pytest.raises(BadInput, match="study transfer: nothing was searched"):
        _methods_of(tmp_path)
    with pytest.raises(BadInput, match="study prompt-content: nothing was searched"):
        moves(SimpleNamespace(space=Workspace(tmp_path)))  # type: ignore[arg-type]


def test_transfer_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its methods are there for it alone: whoever compares all methods afterwards does not find them."""
    before = methods()
    there = replace(scripted.data(), name="other-stripes")
    monkeypatch.setattr("passdeploy.study.transfer.halves", lambda data: (there, data))
    findings, page = study("transfer", make_config(CONFIG), "0", tmp_path, data=scripted.data())
    from_there = ["its structure from there", "its hypernetwork from there"]
    assert [*dict.fromkeys(row.method for row in findings.rows)] == [
        "searched here",
        *from_there,
        "sensitivity alone",
        "l1",
    ]
    assert {row["data"] for row in findings.numbers["source_rows"]} == {"other-stripes"}
    assert all(title in page.read_text() for title in from_there)
    assert methods() == before


def test_prompt_content_for_real(tmp_path: Path) -> None:
    findings, page = study("prompt-content", make_config(CONFIG), "0", tmp_path, data=scripted.data())
    entry = findings.numbers["seeds"]["0"]
    assert entry["prompt_largest"] > 0 and entry["mean_move_of_log_score"] > 0
    assert set(entry["move_against"]) == {"L1", "Taylor", "prior (measured sensitivity)"}
    assert all(value is None or -1 <= value <= 1 for value in entry["move_against"].values())
    assert (tmp_path / "prompt-0.png").read_bytes().startswith(b"\x89PNG")
    assert "prompt-0.png" in page.read_text()
