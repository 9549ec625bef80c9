"""Comparisons: rows that survive a kill, exact statistics, and real runs on an engine of scripted latency."""

from __future__ import annotations

import io
import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from rich.console import Console
from torch import nn

from passdeploy.cli import main
from passdeploy.compare.command import compare, parse_methods, parse_seeds
from passdeploy.compare.page import html, write_pages
from passdeploy.compare.parallel import _job, work_off
from passdeploy.compare.plot import tradeoff
from passdeploy.compare.rows import Row, RowFile
from passdeploy.compare.runner import Arm, Outcome, Plan, arms_of, collected, missing, rows_of, run_plan, share
from passdeploy.compare.statistics import budgets, cells, curve, equal_accuracy, mean, speed_at, t95
from passdeploy.compare.table import markdown, note, render
from passdeploy.config import make_config
from passdeploy.data.base import ImageData, SubSplit
from passdeploy.engines.base import get_backend
from passdeploy.errors import BadInput, NotWritten
from passdeploy.pipeline import Run
from passdeploy.reporting import format as f
from passdeploy.search import method as search_method
from passdeploy.targets import resolve
from passdeploy.workspace import write_json
from tests import scripted

pytestmark = pytest.mark.usefixtures("exported_once")

ROW = Row(
    method="pass", data="d", model="m", budget="2x", axis="latency", seed=0, split="test", status="within_budget",
    accuracy=0.9, dense_accuracy=0.93, ratio=2.05, ratio_ci95=(2.0, 2.1), macs=1e6, dense_macs=2.5e6, params=100,
    seconds={"search": 2.0, "finetune": 3.0}, steps=100, settings="s", device="a CPU",
)  # fmt: skip


def rows() -> list[Row]:
    """pass against l1 at two budgets, three seeds."""
    found = []
    for seed in range(3):
        for budget, speed in (("2x", 2.0), ("3x", 3.0)):
            found.append(replace(ROW, seed=seed, budget=budget, ratio=speed, accuracy=0.93 - 0.01 * speed))
            lost = 0.02 * speed + (0.001 * seed if budget == "3x" else 0.0)
            found.append(replace(ROW, method="l1", seed=seed, budget=budget, ratio=speed, accuracy=0.93 - lost))
    return found


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_rows_round_trip_and_the_last_of_a_key_counts(tmp_path: Path, name: str) -> None:
    file = RowFile(tmp_path / "deep" / name)
    assert file.read() == []
    file.append([ROW, replace(ROW, split="validation")])
    file.append([replace(ROW, accuracy=0.5)])
    assert file.read() == [replace(ROW, split="validation"), replace(ROW, accuracy=0.5)]


def test_a_row_cut_off_by_a_kill_is_dropped_and_the_file_goes_on(tmp_path: Path) -> None:
    file = RowFile(tmp_path / "rows.jsonl")
    file.append([ROW])
    with file.path.open("a") as raw:
        raw.write('{"method": "l1", "da')
    assert file.read() == [ROW]
    other = replace(ROW, seed=1)
    file.append([other])
    assert file.read() == [ROW, other]


@pytest.mark.parametrize("content", ['[{"method": 1}]', "{", "[1, 2", "[1, 2]", '{"rows": []}'])
def test_rows_of_something_else_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(content)
    with pytest.raises(BadInput, match=r"rows\.json"):
        RowFile(path).read()


def test_mean_and_its_interval() -> None:
    assert mean([]) is None
    single = mean([0.5])
    assert single is not None and (single.value, single.half, single.n) == (0.5, None, 1)
    three = mean([1.0, 2.0, 3.0])
    assert three is not None and three.value == 2.0
    assert three.half == pytest.approx(4.303 / math.sqrt(3))
    # Against the table of Student's t: 40, 60 and 120 degrees of freedom.
    assert [t95(n) for n in (40, 60, 120)] == pytest.approx([2.021, 2.000, 1.980], abs=2e-3)


def test_cells_are_paired_by_seed_and_sorted_by_accuracy() -> None:
    found = cells(rows(), "test")
    assert [(cell.budget, cell.method) for cell in found] == [
        ("2x", "pass"),
        ("2x", "l1"),
        ("3x", "pass"),
        ("3x", "l1"),
    ]
    assert found[0].difference is None
    assert found[1].difference is not None and found[1].difference.value == pytest.approx(-0.02)
    assert found[1].difference.half == pytest.approx(0.0, abs=1e-12)
    third = found[3].difference
    assert third is not None and third.value == pytest.approx(-0.031)
    assert third.half == pytest.approx(4.303 * 0.001 / math.sqrt(3))


def test_a_seed_that_only_one_of_them_has_is_no_pair() -> None:
    missing = [row for row in rows() if not (row.method == "pass" and row.seed == 2)]
    (cell,) = [c for c in cells(missing, "test") if c.method == "l1" and c.budget == "3x"]
    assert cell.accuracy is not None and cell.accuracy.n == 3
    assert cell.difference is not None and cell.difference.n == 2


def test_a_method_that_lacks_the_hard_seeds_is_no_better_for_it() -> None:
    given = [replace(ROW, seed=seed, accuracy=accuracy) for seed, accuracy in enumerate((0.80, 0.70, 0.60))]
    given.append(replace(ROW, method="l1", accuracy=0.79))
    assert [cell.method for cell in cells(given, "test")] == ["pass", "l1"]
    assert "| l1 | 79.00 (1 of 3 seeds) |" in markdown(given, "test")
    (at,) = equal_accuracy(given, "test")
    assert at.accuracy == pytest.approx(0.80)
    (alone,) = equal_accuracy([*given[1:3], given[3]], "test")
    assert alone.accuracy == pytest.approx(0.65) and alone.speed is None, "no seed in common"


def test_a_run_that_missed_its_budget_has_no_accuracy_but_is_counted() -> None:
    lost = replace(ROW, method="l1", status="infeasible", accuracy=None, ratio=None, ratio_ci95=None, macs=None)
    found = {cell.method: cell for cell in cells([ROW, lost], "test")}
    assert found["l1"].accuracy is None and found["l1"].statuses == ("infeasible",)
    assert "infeasible" in markdown([ROW, lost], "test")


def test_budgets_from_easy_to_hard() -> None:
    given = [replace(ROW, budget=budget) for budget in ("10x", "2x", "1.5x")]
    assert budgets(given) == ["1.5x", "2x", "10x"]
    assert budgets([replace(ROW, budget=budget) for budget in ("2ms", "8ms")]) == ["8ms", "2ms"]
    assert budgets([replace(ROW, budget=budget) for budget in ("800us", "0.01s", "5ms")]) == ["0.01s", "5ms", "800us"]


def test_means_say_when_networks_over_budget_are_in_them() -> None:
    slow = replace(ROW, seed=1, status="over_budget", accuracy=0.92, ratio=1.9)
    (cell,) = cells([ROW, slow], "test")
    assert cell.accuracy is not None and cell.accuracy.n == 2 and cell.over_budget == 1
    assert "† |" in markdown([ROW, slow], "test") and "† networks over budget" in markdown([ROW, slow], "test")
    assert "†" not in markdown([ROW, replace(slow, status="within_budget")], "test")


def test_what_its_engine_does_not_compute_is_in_no_mean() -> None:
    broken = [
        replace(row, status="not_equivalent", accuracy=0.1) if (row.method, row.seed) == ("l1", 1) else row
        for row in rows()
    ]
    found = {cell.method: cell for cell in cells(broken, "test") if cell.budget == "2x"}
    assert found["l1"].accuracy is not None and found["l1"].accuracy.n == 2 and found["l1"].seeds == 3
    assert found["l1"].difference is not None and found["l1"].difference.n == 2
    assert min(y for _, y in curve(broken, "l1", "test")) > 0.5
    assert "10.00 %" not in str(tradeoff(broken, "test"))


def test_speed_at_equal_accuracy() -> None:
    line = [(1.0, 0.93), (2.0, 0.90), (4.0, 0.80)]
    assert speed_at(line, 0.90) == pytest.approx(2.0)
    assert speed_at(line, 0.85) == pytest.approx(3.0)
    assert speed_at(line, 0.95) is None, "more than it ever has"
    assert speed_at(line, 0.70) is None, "it may be faster still: unknown"
    # l1 loses 2 points per unit of speed-up, pass 1: what pass has at 3x (0.90), l1 has at 1.5x.
    (at,) = [item for item in equal_accuracy(rows(), "test") if item.budget == "3x"]
    assert at.accuracy == pytest.approx(0.90)
    assert at.speed == pytest.approx(1 + 0.03 / 0.04)
    assert curve(rows(), "pass", "test")[0] == (1.0, pytest.approx(0.93))
    anew = [replace(row, method="scratch") for row in rows() if row.method == "l1"]
    assert [speed for speed, _ in curve(anew, "scratch", "test")] == [2.0, 3.0]


@pytest.mark.parametrize("others", [[], [ROW]])
def test_the_dense_network_is_not_what_was_trained_from_scratch(others: list[Row]) -> None:
    """Nor is the first budget of what was, which has a point like every other."""
    figure = str(tradeoff([replace(ROW, method="scratch", accuracy=0.7), *others], "test"))
    assert "dense: 93.00 %" in figure and "scratch: 70.00 % at 2.05x</title>" in figure
    assert "scratch: 70.00 % at 2.05x" in figure.partition(">")[0], "what a screen reader says"


def test_pages_name_every_method_and_load_nothing() -> None:
    page = html(rows(), "test")
    assert "pass" in page and "l1" in page and "<svg" in page
    assert "http://" not in page and "https://" not in page and "<script" not in page
    text = markdown(rows(), "test")
    assert f"| l1 | 89.00 ± 0.00 | {f.MINUS}2.00 ± 0.00 |" in text
    assert "Speed-up at equal accuracy" in text


def test_a_method_is_escaped_in_the_page_and_no_markup_on_the_terminal() -> None:
    assert "<b>x" not in html([ROW, replace(ROW, method="<b>x")], "test")
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(render([ROW, replace(ROW, method="a[1][/b]")], "test"))
    assert "a[1][/b]" in console.export_text()


def test_tables_say_what_the_accuracies_are() -> None:
    def said(**extra: str) -> str:
        return note([replace(ROW, extra=extra)], "test")

    assert "in int8, measured on the engines" in said(precision="int8", accuracy_of="engine")
    assert "the graphs that the engines are built from" in said(precision="int8", accuracy_of="graph")
    assert "the networks' in fp32, speed-ups the int8 engines'" in said(precision="int8", accuracy_of="network")
    assert "Accuracy is the mean IoU." in said(metric="mean IoU")
    assert "ccurac" not in said()


def test_budgets_in_macs_are_not_called_speed() -> None:
    found = [replace(row, axis="macs", macs=row.dense_macs / float(row.ratio or 1), ratio=1.1) for row in rows()]
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(render(found, "test"))
    for page in (html(found, "test"), markdown(found, "test"), " ".join(console.export_text().split())):
        assert "2x fewer MACs" in page and "Fewer MACs at equal accuracy" in page and "times fewer there" in page
        assert "its speed-up there" not in page and "closed loop" not in page
        assert "speed-ups are measured, but nothing was steered by them" in page
    assert "its speed-up there" in html(rows(), "test") and "closed loop" in html(rows(), "test")


@pytest.mark.parametrize("axis", ["latency", "macs"])
def test_what_was_only_predicted_is_not_called_measured(axis: str) -> None:
    found = [replace(row, axis=axis, ratio=None, ratio_ci95=None, status="unverified") for row in rows()]
    assert "othing was measured" in note(found, "test") and "are measured" not in note(found, "test")
    assert "closed loop" not in html(found, "test")


@pytest.mark.parametrize("text", ["", "a", "0,0", "0,00", "7,1,01", "-1", "1.5"])
def test_bad_seeds(text: str) -> None:
    with pytest.raises(BadInput, match="--seeds"):
        parse_seeds(text)


def test_methods_by_name() -> None:
    assert parse_methods("pass, l1") == ("pass", "l1")
    assert {"pass", "mdp", "scratch"} <= set(parse_methods("all"))
    with pytest.raises(BadInput, match="did you mean"):
        arms_of(["taylr"])
    with pytest.raises(BadInput, match="once"):
        arms_of(["l1", "l1"])


CONFIG = {
    **scripted.SETTINGS,
    "model": "tiny-resnet",
    "data": "stripes",
    "latency": "1.3x",
    "epochs": 1,
    "profile": {"seconds": 1e6, "structures": 12, "cache": "off"},
    "search": {"epochs": 0.5, "min_steps": 12},
    "finetune": {"min_steps": 16},
    "dense": {"epochs": 1, "min_steps": 16},
}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    out = tmp_path_factory.mktemp("compare")
    outcome = compare(make_config(CONFIG), "pass,l1,mdp", "0", out, data=scripted.data())
    return out, outcome


def test_every_run_leaves_a_row_per_split(done: tuple[Path, Outcome]) -> None:
    out, outcome = done
    assert outcome.failed == {}
    assert {(row.method, row.split) for row in outcome.rows} == {
        (method, split) for method in ("pass", "l1", "mdp") for split in ("validation", "test")
    }
    for row in outcome.rows:
        report = json.loads((out / row.method / "0" / "report" / "report.json").read_text())
        assert row.status == report["status"] == "within_budget"
        assert row.ratio == report["speedup"]["latency"]
        assert row.ratio is not None and row.ratio >= 1.3
        if row.split == "test":
            assert row.accuracy == report["pruned"]["accuracy"] and row.dense_accuracy == report["dense"]["accuracy"]
    for name in ("compare.jsonl", "compare.json", "compare.md", "compare.html"):
        assert (out / name).is_file()


def test_beside_an_engines_speed_stands_its_own_accuracy(done: tuple[Path, Outcome], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(done[0] / "l1" / "0", tmp_path / "l1" / "0"))
    rows = RowFile(tmp_path / "r.jsonl")
    plan = Plan(make_config(CONFIG), arms_of(["l1"]), (0,), tmp_path, rows, data=scripted.data())
    run = Run(plan.arm_config(plan.arms[0], 0), folder, data=plan.data)
    plan.target = run.target = run.target.with_(precision="int8")
    engines = {"dense": 0.5, "model": 0.4, "of": "engine"}
    run.space.run("compile", {}, lambda made: write_json(made / "accuracy.json", engines))
    by = {row.split: row for row in rows_of(run, run.runs[0], plan, plan.arms[0])}
    assert (by["test"].accuracy, by["test"].dense_accuracy) == (0.4, 0.5)
    assert by["test"].extra == {"precision": "int8", "accuracy_of": "engine"}
    network = json.loads((folder / "finetune" / "finetune.json").read_text())["accuracy"]
    assert by["validation"].accuracy == network["validation"] and by["validation"].extra["accuracy_of"] == "network"
    rows.append(by.values())
    assert not missing(plan)
    rows.append(replace(row, extra={}) for row in by.values())  # as they were when the networks' stood in both
    assert missing(plan)


def test_every_method_takes_the_same_number_of_steps(done: tuple[Path, Outcome]) -> None:
    assert {row.steps for row in done[1].rows} == {12 + 16}


def test_all_methods_share_the_dense_network_and_the_latency_model(done: tuple[Path, Outcome]) -> None:
    out, _ = done
    for stage, file in (("dense", "dense.safetensors"), ("profile", "profile.json")):
        contents = {(out / method / "0" / stage / file).read_bytes() for method in ("pass", "l1", "mdp")}
        assert len(contents) == 1
    assert len(list((out / "shared").iterdir())) == 2


def test_started_again_nothing_runs(done: tuple[Path, Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    from passdeploy.pipeline import Run

    out, before = done
    monkeypatch.setattr(Run, "__init__", lambda *a, **k: pytest.fail("a run was started"))
    after = compare(make_config(CONFIG), "pass,l1,mdp", "0", out, data=scripted.data())
    assert after.rows == before.rows


def test_rows_are_found_again_when_their_file_was_lost(done: tuple[Path, Outcome], tmp_path: Path) -> None:
    """Finished stages are kept, so that only the rows are written anew."""
    out, before = done
    plan = Plan(make_config(CONFIG), arms_of(["l1"]), (0,), out, RowFile(tmp_path / "r.jsonl"), data=scripted.data())
    digests = {p: p.read_bytes() for p in (out / "l1").rglob("stage.json")}
    found = run_plan(plan)
    assert found.rows == [row for row in before.rows if row.method == "l1"]
    assert digests == {p: p.read_bytes() for p in (out / "l1").rglob("stage.json")}


def test_a_method_that_fails_does_not_end_the_comparison(
    done: tuple[Path, Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverges(_: object) -> NoReturn:
        raise BadInput("training diverged: the loss is nan")

    monkeypatch.setitem(search_method._REGISTRY, "diverges", diverges)
    out, _ = done
    arms = (Arm("diverges", "diverges"), Arm("l1", "l1"))
    outcome = run_plan(Plan(make_config(CONFIG), arms, (0,), out, RowFile(tmp_path / "r.jsonl"), data=scripted.data()))
    assert outcome.failed == {"diverges, seed 0": "training diverged: the loss is nan"}
    assert {row.method for row in outcome.rows} == {"l1"}
    write_pages(outcome, "test", tmp_path)
    assert "- diverges, seed 0: training diverged" in (tmp_path / "compare.md").read_text()
    assert "diverges, seed 0: training diverged" in (tmp_path / "compare.html").read_text()
    assert json.loads((tmp_path / "compare.json").read_text())["failed"] == outcome.failed


def test_a_run_that_is_out_of_memory_does_not_end_the_comparison(
    done: tuple[Path, Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def greedy(_: object) -> NoReturn:
        raise torch.OutOfMemoryError("tried to allocate 80 GiB")

    monkeypatch.setitem(search_method._REGISTRY, "greedy", greedy)
    arms = (Arm("greedy", "greedy"), Arm("l1", "l1"))
    plan = Plan(make_config(CONFIG), arms, (0,), done[0], RowFile(tmp_path / "r.jsonl"), data=scripted.data())
    outcome = run_plan(plan)
    assert outcome.failed == {"greedy, seed 0": "OutOfMemoryError: tried to allocate 80 GiB"}
    assert {row.method for row in outcome.rows} == {"l1"}


def test_what_all_share_is_computed_once_more_when_the_data_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from passdeploy.stages import SHARED

    calls: list[str] = []
    for stage in ("dense", "profile"):
        body = SHARED[stage]
        monkeypatch.setitem(SHARED, stage, lambda run, f, s=stage, b=body: (calls.append(s), b(run, f)))

    def prepare(data: ImageData) -> None:
        for method in ("l1", "uniform"):
            config = make_config({**CONFIG, "method": method, "profile": {**CONFIG["profile"], "structures": 9}})
            share(Run(config, tmp_path / method, data=data), tmp_path / "shared")

    prepare(scripted.data())
    assert calls == ["dense", "profile"]
    fewer = scripted.data()
    fewer.train = SubSplit(fewer.train, torch.arange(200))
    prepare(fewer)
    assert calls == ["dense", "profile"] * 2


def test_what_cannot_be_written_ends_the_comparison(
    done: tuple[Path, Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> NoReturn:
        raise NotWritten("r.jsonl: cannot be written (No space left on device)")

    monkeypatch.setattr(RowFile, "append", full)
    out, _ = done
    with pytest.raises(NotWritten):
        run_plan(Plan(make_config(CONFIG), arms_of(["l1", "mdp"]), (0,), out, RowFile(tmp_path / "r.jsonl"),
                      data=scripted.data()))  # fmt: skip


def test_rows_of_other_settings_are_not_compared(done: tuple[Path, Outcome], tmp_path: Path) -> None:
    out, before = done
    other = RowFile(tmp_path / "r.jsonl")
    other.append([replace(row, settings="else") for row in before.rows])
    plan = Plan(make_config(CONFIG), (), (0,), out, other, data=scripted.data())
    assert run_plan(plan).rows == []


@pytest.mark.parametrize(
    ("change", "again"),
    [
        ({"search": {"ramp": 0.5}}, ["pass"]),  # only what trains in its search knows of it
        ({"search": {"depth": False}}, ["pass", "l1"]),
        ({"seed": 5, "method": "taylor"}, []),
    ],
)
def test_what_a_setting_makes_run_again(tmp_path: Path, change: dict[str, object], again: list[str]) -> None:
    def plan(**settings: object) -> Plan:
        config = make_config({**CONFIG, **settings, "latency": "2x"})
        arms = arms_of(["pass", "l1"])
        return Plan(config, arms, (0,), tmp_path, RowFile(tmp_path / "r.jsonl"), data=scripted.data())

    before = plan()
    shared = {"settings": before.settings(), "inputs": before.inputs, "device": before.target.device}
    before.rows.append(replace(ROW, method=arm.name, own=before.own(arm), **shared) for arm in before.arms)
    assert missing(before) == [] and len(collected(before)) == 2
    search = {**CONFIG["search"], **change.get("search", {})}  # type: ignore[dict-item]
    assert [arm.name for arm, _ in missing(plan(**{**change, "search": search}))] == again


def test_what_is_run_again_lies_beside_what_there_was(done: tuple[Path, Outcome], tmp_path: Path) -> None:
    out = shutil.copytree(done[0], tmp_path / "out")
    before = (out / "pass" / "0" / "config.yaml").read_bytes()
    config = make_config({**CONFIG, "search": {**CONFIG["search"], "ramp": 0.5}})  # type: ignore[dict-item]
    plan = Plan(config, arms_of(["pass", "l1"]), (0,), out, RowFile(out / "compare.jsonl"), data=scripted.data())
    folders = [plan.folder(arm, 0) for arm in plan.arms]
    assert folders[0].parent == folders[1].parent.with_name("pass") and folders[0].name.startswith("0-")
    assert work_off(_job(plan, plan.arms[0], 0) | {"only_share": True}) == {}
    assert len(missing(plan)) == 1
    outcome = run_plan(plan)
    assert outcome.failed == {} and {row.method for row in outcome.rows} == {"pass", "l1"}
    assert missing(plan) == [] and plan.folder(plan.arms[0], 0) == folders[0]
    assert (folders[0] / "report" / "report.json").exists()
    assert (out / "pass" / "0" / "config.yaml").read_bytes() == before


def test_arms_of_other_settings_are_run_again_under_the_same_name() -> None:
    plan = Plan(make_config(CONFIG), (), (0,), Path(), RowFile(Path("r.jsonl")))
    assert plan.own(Arm("a", "pass", {"search": {"depth": False}})) != plan.own(Arm("a", "pass"))
    assert plan.own(Arm("a", "pass")) == plan.own(Arm("b", "pass")) != plan.own(Arm("a", "l1"))


def test_an_arm_may_have_settings_of_its_own() -> None:
    plan = Plan(make_config(CONFIG), (), (0,), Path(), RowFile(Path("r.jsonl")))
    arm = Arm("pass without depth", "pass", {"search": {"depth": False}})
    config = plan.arm_config(arm, 3)
    assert (config.search.depth, config.search.min_steps, config.seed) == (False, 12, 3)
    with pytest.raises(BadInput, match=r"arm wrong: unknown key 'search\.dept'"):
        plan.arm_config(Arm("wrong", "pass", {"search": {"dept": False}}), 0)


def test_budgets_in_macs(tmp_path: Path) -> None:
    config = make_config({**CONFIG, "axis": "macs", "latency": "1.5x"})
    outcome = compare(config, "l1", "0", tmp_path, data=scripted.data())
    row = outcome.rows[0]
    assert row.reduction is not None and row.reduction >= 1.5 and row.status == "within_budget"
    assert row.ratio is not None, "the engine is measured all the same"
    with pytest.raises(BadInput, match="--axis macs"):
        compare(make_config({**CONFIG, "axis": "macs", "latency": "1ms"}), "l1", "0", tmp_path / "other")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "l2"], "--method l2: no such method"),
        (["--seeds", "x"], "--seeds"),
        (["--split", "train"], "--split train"),
        (["--axis", "watts"], "axis"),
        (["--latency", "2"], "no unit"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["passdeploy", "compare", "--out", str(tmp_path / "c"), "--json", *arguments])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error:") and message in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("change", ["inputs", "device"])
def test_rows_of_other_things_under_the_same_names_are_run_again(
    done: tuple[Path, Outcome], tmp_path: Path, change: str
) -> None:
    """The weights at a path may be others by now, and the folder may have come from another machine."""
    out, before = done
    assert len({row.inputs for row in before.rows}) == 1 and before.rows[0].inputs
    other = RowFile(tmp_path / "r.jsonl")
    other.append([replace(row, **{change: "else"}) for row in before.rows])
    plan = Plan(make_config(CONFIG), arms_of(["l1"]), (0,), out, other, data=scripted.data())
    assert missing(plan) == [(plan.arms[0], 0)] and collected(plan) == []
    found = run_plan(plan)
    assert found.rows and {getattr(row, change) for row in found.rows} == {getattr(before.rows[0], change)}


def test_what_the_inputs_of_a_comparison_are(tmp_path: Path) -> None:
    def inputs(network: nn.Module | None = None, images: ImageData | None = None) -> str:
        config = make_config(CONFIG)
        return Plan(config, (), (0,), tmp_path, RowFile(tmp_path / "r"), network, images or scripted.data()).inputs

    torch.manual_seed(1)
    one, two = scripted.tiny_resnet(), scripted.tiny_resnet()
    assert inputs(one) == inputs(one) != inputs(two)
    fewer = scripted.data()
    fewer.train = SubSplit(fewer.train, torch.arange(200))
    assert inputs(images=fewer) != inputs() == inputs()


@pytest.mark.parametrize("changed", ["huge pages", "version", "target"])
def test_rows_measured_under_other_conditions_are_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    torch.manual_seed(1)
    network = scripted.tiny_resnet()

    def inputs(**settings: object) -> str:
        config = make_config({**CONFIG, **settings})
        return Plan(config, (), (0,), tmp_path, RowFile(tmp_path / "r"), network, scripted.data()).inputs

    before = inputs()
    if changed == "huge pages":
        monkeypatch.setattr("passdeploy.dependencies.cpu_stamp", lambda: "this one, huge pages")
    elif changed == "version":
        backend = type(get_backend(resolve("cpu", backend=make_config(CONFIG).backend).backend))
        monkeypatch.setattr(backend, "libraries", lambda self: "99.0")
    assert inputs(**({"threads": 2} if changed == "target" else {})) != before
