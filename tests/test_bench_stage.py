"""How many fresh processes a bench asks, and what it says when they do not agree."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from passdeploy.budget import parse_budget
from passdeploy.errors import BadInput, NotWritten
from passdeploy.judging import judge, ratio_of
from passdeploy.latency.measurement import Comparison, Measurement
from passdeploy.latency.stats import median_ratio
from passdeploy.remarks import disturbance, host_bound, other_pace
from passdeploy.stages import bench as stage
from passdeploy.stages.bench import AGAIN, MOST_PROCESSES, PRECISE, PROCESSES, until_undisturbed


def test_six_processes_are_the_fewest_with_an_interval() -> None:
    assert median_ratio([2.0] * PROCESSES).low == 2.0
    assert median_ratio([2.0] * (PROCESSES - 1)).low == 0.0


def test_how_far_an_interval_reaches_decides_on_more_processes() -> None:
    assert median_ratio([1.99, 2.0, 2.0, 2.0, 2.0, 2.01]).reach < PRECISE
    assert median_ratio([1.9, 2.0, 2.0, 2.0, 2.0, 2.01]).reach > PRECISE
    assert median_ratio([1.9] + [2.0] * (PROCESSES + 2)).reach < PRECISE, "one that was disturbed is outvoted"
    assert median_ratio([2.0] * (PROCESSES - 1)).reach == float("inf")
    assert MOST_PROCESSES >= 2 * PROCESSES


@pytest.mark.parametrize(("processes", "said"), [((2.0, 2.05), False), ((2.0, 2.3), True), ((2.0,), False)])
def test_a_disturbed_machine_is_named(processes: tuple[float, ...], said: bool) -> None:
    notes = disturbance({"processes": list(processes)})
    assert bool(notes) == said
    assert all("15% apart" in note for note in notes)


@pytest.mark.parametrize(("disturbed", "spread", "said"), [(10, 0.05, False), (11, 0.05, True), (0, 0.11, True)])
def test_blocks_that_stand_out_are_named(disturbed: int, spread: float, said: bool) -> None:
    quiet = Measurement(1.0, 1.0, 1.0, 1.0, n=120, spread=0.01, blocks=40, disturbed=0, samples=())
    thin = replace(quiet, disturbed=disturbed, spread=spread)
    notes = disturbance({"processes": [2.0, 2.0], "dense": quiet.to_json(), "thin": thin.to_json()})
    start = f"The machine was disturbed while the pruned engine was timed: {disturbed} of 40 blocks stood out"
    assert [note.startswith(start) for note in notes] == [True] * said


def test_what_was_not_measured_was_not_disturbed() -> None:
    assert disturbance({"measured": False}) == []
    assert disturbance(None) == []


@pytest.mark.parametrize(("then", "now", "said"), [(0.521, 0.689, True), (0.689, 0.521, True), (0.5, 0.55, False),
                                                   (None, 0.5, False), (0.5, None, False)])  # fmt: skip
def test_a_machine_that_has_changed_since_the_fit_is_named(then: float | None, now: float | None, said: bool) -> None:
    notes = other_pace(then, now)
    assert bool(notes) == said
    assert all("passdeploy verify --measure" in note for note in notes)


def comparison(dense_ms: float) -> Comparison:
    each = Measurement(dense_ms, dense_ms, dense_ms, dense_ms, n=9, spread=0.01, blocks=9, disturbed=0, samples=())
    return Comparison({"dense": each, "thin": each}, {"dense": (1.0,), "thin": (1.0,)}, "dense")


@pytest.mark.parametrize(
    ("fitted", "dense", "made"),
    [
        (0.5, [0.55, 0.5], 1),
        (0.5, [0.7, 0.52, 0.5], 2),
        (0.5, [0.7, 0.8, 0.75, 0.5], 1 + AGAIN),
        (0.7, [0.5, 0.7], 1),  # the closed loop was disturbed, not this
        (None, [0.7, 0.5], 1),
    ],
)
def test_a_slow_dense_engine_is_measured_again(fitted: float | None, dense: list[float], made: int) -> None:
    left, said = iter(dense), []
    found = until_undisturbed(lambda: comparison(next(left)), fitted, said.append)
    assert [each.measurements["dense"].p50 for each in found] == dense[:made]
    assert said == dense[: made - 1]


def test_the_least_disturbed_of_several_measurements_is_called_so() -> None:
    (note,) = other_pace(0.5, 0.7, attempts=3)
    assert "in the measurement that decides, the least disturbed of 3, and took" in note


@pytest.mark.parametrize(
    ("raised", "told"),
    [(BadInput("engine: full"), "engine: full"), (RuntimeError("no memory\nat 0"), "RuntimeError: no memory")],
)
def test_what_was_measured_is_not_lost_for_layers_that_cannot_be_watched(
    monkeypatch: pytest.MonkeyPatch, raised: Exception, told: str
) -> None:
    """Whoever raises it: a runtime's errors are none of ours."""
    left = [raised, NotWritten("full")]

    def watched(*_: Any) -> None:
        raise left.pop(0)

    said: list[str] = []
    run = cast(Any, SimpleNamespace(ui=SimpleNamespace(say=said.append)))
    monkeypatch.setattr(stage, "_watched", watched)
    assert stage._layer_times(run, {}) is None
    assert said == [f"the layers are not timed: {told}"]
    with pytest.raises(NotWritten):
        stage._layer_times(run, {})


def test_a_report_says_where_the_host_sets_the_pace() -> None:
    (note,) = host_bound({"thin": {"p50": 0.2, "enqueue": 0.19}})
    assert note.startswith("The host takes 190 µs to enqueue an inference that takes the GPU 200 µs")
    assert host_bound({"thin": {"p50": 0.2, "enqueue": 0.1}}) == []
    assert host_bound({"thin": {"p50": 0.2, "enqueue": None}}) == []
    assert host_bound({"measured": False}) == []
    assert host_bound(None) == []


def test_an_interval_without_an_end_is_none_and_meets_no_speed_up() -> None:
    known = {"ratio": {"value": 2.1, "low": 2.0, "high": 2.2}}
    endless = {"ratio": {"value": 2.1, "low": 2.0, "high": None}}
    unknown = {"ratio": {"value": 2.1, "low": None, "high": None}}
    assert [ratio_of(found) for found in (known, endless, unknown)] == [(2.1, (2.0, 2.2)), (2.1, None), (2.1, None)]
    assert [judge(parse_budget("2x"), found) for found in (known, endless, unknown)] == [
        "within_budget",
        "within_budget",
        "over_budget",
    ]
