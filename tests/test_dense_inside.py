"""Budgets that the dense engine may meet as it is: it is measured with a margin, and what to prune is known anyway."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from passdeploy.budget import parse_budget
from passdeploy.errors import BadInput
from passdeploy.judging import asked_ms, judge
from passdeploy.latency.loop import AIM
from passdeploy.latency.measurement import Comparison, Measurement
from passdeploy.shipping.manifest import BundleManifest
from passdeploy.shipping.measuring import arrived
from passdeploy.stages.fit import DENSE_TIMINGS
from passdeploy.stages.search import NEARLY_DENSE, search_context
from passdeploy.structure import Structure
from tests import scripted

pytestmark = pytest.mark.usefixtures("exported_once")


def bench(value: float, low: float) -> dict[str, Any]:
    return {"ratio": {"value": value, "low": low, "high": 1.05}}


def test_for_the_dense_network_itself_1x_is_no_toss_of_a_coin() -> None:
    once, twice = parse_budget("1x"), parse_budget("2x")
    assert judge(once, bench(0.997, 0.985), unchanged=True) == "within_budget"
    assert judge(once, bench(0.997, 0.97), unchanged=True) == "over_budget"
    assert judge(once, bench(0.997, 0.985)) == "over_budget"
    assert judge(twice, bench(1.997, 1.985), unchanged=True) == "over_budget"


def test_what_a_speed_up_comes_to_in_time() -> None:
    """`dense_ms` is at the percentile, of which there may be too few samples."""
    assert asked_ms(parse_budget("2x", "p99"), 0.6) == 0.3
    assert asked_ms(parse_budget("2x", "p99"), None) is None
    assert asked_ms(parse_budget("5ms", "p99"), None) == asked_ms(parse_budget("5ms", "p99"), 0.6) == 5


@pytest.fixture(scope="module")
def close(single: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Budgets 1 % and 8 % above what the dense engine takes: the latency model says that it meets both."""
    weights = str(single / "dense" / "dense.safetensors")
    dense_ms = json.loads((single / "report.json").read_text())["dense"]["latency_ms"]["p50"]
    out = tmp_path_factory.mktemp("close") / "run"
    run = scripted.start(out, weights=weights, latency=f"{1.01 * dense_ms:.6f}ms,{1.08 * dense_ms:.6f}ms")
    run.slicer = scripted.slicer(run)  # type: ignore[misc]
    run.run_until("fit")
    return run


def test_a_prediction_does_not_spare_the_search(close: Any) -> None:
    """Where the measurement contradicts it, what to prune has to be known."""
    assert all(budget.budget.target_ratio(search_context(close).predictor.dense_ms) >= 1 for budget in close.runs)
    assert search_context(close).ratios == (NEARLY_DENSE, NEARLY_DENSE)
    found = json.loads((close.space.folder("search") / "search.json").read_text())
    assert found["allocator"] != "uniform"
    assert found["curves"]["step"]


def test_a_profile_of_a_slower_machine_does_not_move_what_is_searched_for(close: Any, tmp_path: Path) -> None:
    """A budget in time is held against the dense engine here, not against the one of the profile."""
    own, ratios = json.loads((close.space.folder("profile") / "profile.json").read_text()), []
    dense_ms = own["dense_ms"]
    for factor in (1, 2):
        file = tmp_path / f"{factor}.profile.json"
        file.write_text(json.dumps(own | {"dense_ms": factor * dense_ms}))
        run = scripted.start(
            tmp_path / str(factor), weights=close.config.weights, latency=f"{dense_ms / 2}ms", profile_file=str(file)
        )
        run.slicer = scripted.slicer(run)  # type: ignore[misc]
        run.run_until("profile")
        ratios.append(search_context(run).ratios)
    assert ratios[0] == ratios[1] == (pytest.approx(0.5 / AIM, rel=0.02),)


def test_the_dense_engine_is_shipped_only_with_a_margin(close: Any) -> None:
    found = [json.loads((b.space.folder("fit") / "fit.json").read_text()) for b in close.runs]
    assert [fit["status"] for fit in found] == ["within_budget", "dense_inside"]
    assert all(fit["pace_ms"] > 0 for fit in found), "the last measurement is held against it"
    dense = close.subject.groups.dense().digest()
    for budget in close.runs:
        folder = budget.space.folder("fit")
        lines = [json.loads(line) for line in (folder / "measurements.jsonl").read_text().splitlines()]
        assert sum(line["digest"] == dense for line in lines) >= DENSE_TIMINGS
    kept = Structure.load(close.runs[0].space.folder("fit") / "structure.json")
    assert kept.digest() != dense


def test_what_no_measurement_can_contradict_is_not_searched(single: Path, tmp_path: Path) -> None:
    weights = str(single / "dense" / "dense.safetensors")
    run = scripted.start(tmp_path / "run", weights=weights, latency="1x", groups={"fixed": {"conv1": 4}})
    run.slicer = scripted.slicer(run)  # type: ignore[misc]
    run.run_until("fit")
    assert json.loads((tmp_path / "run" / "search" / "search.json").read_text())["allocator"] == "uniform"
    found = json.loads((tmp_path / "run" / "fit" / "fit.json").read_text())
    assert found["status"] == "dense_inside"
    assert "Widths that were fixed (conv1) are those of pruned networks only." in found["messages"]


def test_a_time_that_the_dense_engine_is_far_inside_of_is_not_searched(
    single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = str(single / "dense" / "dense.safetensors")
    dense_ms = json.loads((single / "report.json").read_text())["dense"]["latency_ms"]["p50"]
    run = scripted.start(tmp_path / "run", weights=weights, latency=f"{3 * dense_ms:.6f}ms")
    run.slicer = scripted.slicer(run)  # type: ignore[misc]
    run.shared("search")
    assert json.loads((tmp_path / "run" / "search" / "search.json").read_text())["allocator"] == "uniform"
    with monkeypatch.context() as patch:  # what was decided without scores can't be made good without them
        patch.setattr(scripted, "MACS_PER_SECOND", scripted.MACS_PER_SECOND / 9)
        patch.setattr(scripted, "SECONDS_PER_OPERATOR", scripted.SECONDS_PER_OPERATOR * 9)
        with pytest.raises(BadInput, match=r"found it inside .*ms and left it whole; .*search and run again"):
            run.run_until("fit")
    shutil.rmtree(tmp_path / "run" / ".partial" / "fit")
    run.run_until("fit")
    assert json.loads((tmp_path / "run" / "fit" / "fit.json").read_text())["status"] == "dense_inside"


def test_on_arrival_too_the_interval_alone_decides_on_1x() -> None:
    slower = Measurement(p50=1.0, p90=None, p99=None, mean=1.0, n=9, spread=0.0, blocks=9, disturbed=0, samples=())
    manifest = cast(BundleManifest, SimpleNamespace(status="within_budget"))

    def status(asked: str, pair: float) -> str:
        pairs = {"dense": (1.0,) * 9, "engine": (pair,) * 9}
        compared = Comparison({"dense": slower, "engine": slower}, pairs, "dense")
        return arrived(compared, parse_budget(asked), manifest).status

    assert status("1x", 0.99) == "within_budget"
    assert status("1x", 0.95) == "over_budget"
    assert status("2x", 1.99) == "over_budget"
    assert status("2x", 2.01) == "within_budget"
