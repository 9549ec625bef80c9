"""Comparisons with rivals: which rows a page is made of, and by what a rival is judged."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from torch import nn

from passdeploy.budget import parse_budgets
from passdeploy.compare.rows import Row, RowFile
from passdeploy.console import Ui
from passdeploy.latency.measurement import Comparison
from tests.test_compare import ROW

ROOT = Path(__file__).parents[2]
MODULES = ("common", "train_dense", "compare_cifar", "external", "realisation")


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lets scripts import each other; they are forgotten, since their names are common ones."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def external(benchmarks: None) -> ModuleType:
    import external  # type: ignore[import-not-found]

    module: ModuleType = external
    return module


def runs(methods: str, **changes: object) -> list[Row]:
    return [
        replace(ROW, method=method, split=split, accuracy=0.9 - 0.01 * place, **changes)  # type: ignore[arg-type]
        for place, method in enumerate(methods.split(","))
        for split in ("validation", "test")
    ]


SCREENING = runs("mdp,pass,l1,taylor,halp,tp-magnitude", inputs="a")


def test_the_best_are_chosen_among_all_that_were_screened_not_among_a_few_rerun(
    benchmarks: None, tmp_path: Path
) -> None:
    from compare_cifar import best_of, screened  # type: ignore[import-not-found]

    file = RowFile(tmp_path / "compare-d.json")
    file.append([*SCREENING, *runs("l1,pass", inputs="b")])
    found = screened(file.read())
    assert {row.inputs for row in found} == {"a"}
    assert best_of(found) == ["mdp", "l1", "taylor"]
    assert {row.inputs for row in screened([*SCREENING, *(replace(row, inputs="c") for row in SCREENING)])} == {"c"}
    assert screened([]) == []


def test_finals_are_those_that_pass_was_last_run_with(benchmarks: None) -> None:
    from compare_cifar import run_last

    rows = [*SCREENING, *runs("pass,l1", inputs="b"), *runs("tp-magnitude", settings="of another program")]
    for later in ([], runs("uniform", inputs="a")):
        assert {(row.method, row.inputs) for row in run_last([*rows, *later], "2x")} == {("pass", "b"), ("l1", "b")}
    assert run_last(rows[-2:], "2x") == []


@pytest.mark.parametrize(("data", "epochs", "search"), [("cifar10", 1.0, 0.43), ("fashion-mnist", 0.5, 0.22)])
def test_the_published_pages_say_what_the_rows_do(
    benchmarks: None, monkeypatch: pytest.MonkeyPatch, data: str, epochs: float, search: float
) -> None:
    import compare_cifar

    monkeypatch.setattr(compare_cifar, "write_atomic", lambda path, text: None)
    published = (compare_cifar.PAGES / f"comparison-{data}.md").read_text()
    names = dict.fromkeys(re.findall(r"benchmarks/results/([^/]+)/compare-", published))
    paths = [ROOT / "benchmarks" / "results" / name / f"compare-{data}.json" for name in names]
    args = SimpleNamespace(data=data, model="resnet20", target="cpu", epochs=epochs, search_epochs=search)
    assert compare_cifar.page(args, paths, ["2x", "3x"]) == published


def test_budgets_are_looked_up_as_rows_have_them(
    benchmarks: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import compare_cifar

    asked: list[list[str]] = []
    monkeypatch.setattr(compare_cifar, "PAGES", tmp_path)
    monkeypatch.setattr(compare_cifar, "page", lambda args, paths, budgets: asked.append(budgets) or "")
    monkeypatch.setattr(sys, "argv", ["compare_cifar.py", "page", "--latency", "2X, 3x"])
    compare_cifar.main()
    assert asked == [["2x", "3x"]]


def test_a_page_without_pass_is_refused(benchmarks: None, tmp_path: Path) -> None:
    from compare_cifar import page

    file = RowFile(tmp_path / "compare-d.json")
    file.append(runs("l1,mdp"))
    args = SimpleNamespace(data="d", epochs=1.0, search_epochs=0.43)
    with pytest.raises(SystemExit, match="no rows of pass at 2x"):
        page(args, [file.path], ["2x"])


def test_a_rival_is_judged_by_what_is_measured_again(external: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first measurement chooses, and of those it calls fast enough the lucky ones are not."""

    def comparison(ratio: float) -> Comparison:
        return Comparison({}, {"thin": (ratio,) * 8}, "dense")

    def exact(run: object, rival: str, ratio: float, step: int) -> nn.Module:
        return nn.Linear(round(1000 * ratio), 1)  # twice as fast at a ratio of one half

    speeds = {"once": lambda n: 1.03 * n / 250, "again": lambda n: n / 250}
    monkeypatch.setattr(external, "pruned", exact)
    monkeypatch.setattr(external, "compiled", lambda run, network: network.in_features)
    monkeypatch.setattr(external, "timed", lambda run, engines: comparison(speeds["once"](engines["thin"])))
    monkeypatch.setattr(external, "confirmed", lambda run, b, engines: comparison(speeds["again"](engines["thin"])))
    (budget,) = parse_budgets("1.96x")
    best, said = external.close(SimpleNamespace(ui=Ui(quiet=True)), "a rival", budget, 0, 8)
    assert best is not None and best.in_features >= 490, "486 looks like 2x, and is not"
    assert said.ratio("thin").value == best.in_features / 250


def test_rows_are_kept_as_they_come(benchmarks: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import realisation  # type: ignore[import-not-found]

    def killed(run: object, have: set[str]) -> Iterator[dict[str, str]]:
        yield {"tool": "passdeploy", "asked": "2x"}
        raise KeyboardInterrupt

    target = SimpleNamespace(device="a CPU")
    opened: list[Path] = []

    def opening(config: object, out: Path, ui: Ui) -> SimpleNamespace:
        opened.append(out)
        return SimpleNamespace(target=target)

    other = tmp_path / "runs" / "resnet18-64-cifar10"
    other.mkdir(parents=True)
    (other / "config.yaml").write_text("of other epochs")
    monkeypatch.setattr(realisation, "Run", opening)
    monkeypatch.setattr(realisation, "device_folder", lambda _: tmp_path / "a-new-device")
    monkeypatch.setattr(realisation, "ours", killed)
    monkeypatch.setattr(sys, "argv", ["realisation.py", "--search-epochs", "0.25", "--runs", str(other.parent)])
    with pytest.raises(KeyboardInterrupt):
        realisation.main()
    (row,) = map(json.loads, (tmp_path / "a-new-device" / "realisation.jsonl").read_text().splitlines())
    assert (row["asked"], row["search_epochs"]) == ("2x", 0.25)
    assert opened[0].parent == other.parent and opened[0].name.startswith(f"{other.name}-")


def test_what_is_left_is_made_and_nothing_else(benchmarks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import realisation

    class Dense(Exception):
        """The dense network was asked for."""

    asked, linked = [], []
    speedup = SimpleNamespace(latency=2.0, macs=3.0, realisation=0.7)
    report = SimpleNamespace(status="infeasible", pruned=None, dense=SimpleNamespace(accuracy=0.9), speedup=speedup)

    def shared(until: str = "all") -> None:
        asked.append(until)
        if until == "dense":
            raise Dense

    budgets = [SimpleNamespace(budget=budget) for budget in parse_budgets("2x,3x")]
    run = SimpleNamespace(runs=budgets, shared=shared, finish=lambda budget: report)
    monkeypatch.setattr(realisation, "link_siblings", linked.append)
    for tool in (realisation.ours, realisation.theirs):
        assert list(tool(run, {"2x", "3x"})) == []
    assert asked == linked == []
    assert [row["asked"] for row in realisation.ours(run, {"2x"})] == ["3x"]
    assert asked == ["all"] and linked == [budgets]
    monkeypatch.setattr(realisation, "get_backend", lambda _: None)
    run.target = run.subject = SimpleNamespace(backend=None, data=None)
    with pytest.raises(Dense):
        next(realisation.theirs(run, {"2x"}))
