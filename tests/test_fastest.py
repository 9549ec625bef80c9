"""A minimum accuracy is given, and the fastest structure that keeps it is found."""

from __future__ import annotations

from pathlib import Path

import pytest

from passdeploy.budget import LADDER, parse_budgets
from passdeploy.config import make_config
from passdeploy.errors import BadInput
from passdeploy.reporting import load_report
from passdeploy.workspace import read_json
from tests import scripted

pytestmark = pytest.mark.usefixtures("exported_once")


def test_fastest_stands_for_the_ladder_and_stands_alone() -> None:
    assert tuple(budget.asked for budget in parse_budgets("fastest")) == LADDER
    assert [budget.speedup for budget in parse_budgets("fastest")] == sorted(
        b.speedup or 0 for b in parse_budgets("fastest")
    )
    with pytest.raises(BadInput, match="stands alone"):
        parse_budgets("fastest,2x")
    with pytest.raises(BadInput, match="min_accuracy"):
        make_config({"latency": "fastest"})


def ran(out: Path, weights: Path, floor: float) -> scripted.Run:
    running = scripted.start(
        out, latency="fastest", min_accuracy=floor, weights=str(weights), epochs=0.1,
        search={"epochs": 0.1, "min_steps": 21}, finetune={"min_steps": 2},
    )  # fmt: skip
    running.slicer = scripted.slicer(running)  # type: ignore[misc]
    running.run()
    return running


def test_the_fastest_that_keeps_the_accuracy_is_published(finished: Path, tmp_path: Path) -> None:
    running = ran(tmp_path / "run", finished / "dense" / "dense.safetensors", 0.5)
    (answer,) = running.answers
    tried = {run.budget.asked: load_report(run.space.root / "report.json")
             for run in running.runs if (run.space.root / "report.json").exists()}  # fmt: skip
    assert 1 < len(tried) < len(LADDER)  # a bisection, not a sweep
    best = load_report(tmp_path / "run" / "report.json")
    assert best.budget.asked == answer.budget.asked and best.goal_met
    assert best.budgets is not None and {budget.asked for budget in best.budgets} == set(tried)
    assert all((tmp_path / "run" / str(budget.path)).is_file() for budget in best.budgets)
    for asked, report in tried.items():
        assert report.goal_met == (LADDER.index(asked) <= LADDER.index(answer.budget.asked))
        fine = report.status in ("within_budget", "infeasible")
        kept = (
            fine or read_json(tmp_path / "run" / asked / "finetune" / "finetune.json")["accuracy"]["validation"] < 0.5
        )
        assert kept
    for name in ("model.onnx", "engine", "bundle", "model.safetensors"):
        assert (tmp_path / "run" / name).exists()
    stale = tmp_path / "run" / next(asked for asked in LADDER if asked not in tried) / "report.json"
    stale.parent.mkdir(exist_ok=True)
    stale.write_text((tmp_path / "run" / "report.json").read_text())
    again = ran(tmp_path / "run", finished / "dense" / "dense.safetensors", 0.5)
    assert again.answers[0].budget == answer.budget
    best = load_report(tmp_path / "run" / "report.json")
    assert best.budgets is not None and {budget.asked for budget in best.budgets} == set(tried), "of this run only"


def test_a_floor_that_nothing_keeps_is_missed_by_the_slowest(finished: Path, tmp_path: Path) -> None:
    running = ran(tmp_path / "run", finished / "dense" / "dense.safetensors", 1.0)
    (answer,) = running.answers
    assert answer.budget.asked == LADDER[0]
    assert load_report(tmp_path / "run" / "report.json").status == "accuracy_below_floor"
