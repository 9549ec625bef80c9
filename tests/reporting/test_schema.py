from __future__ import annotations

import json
import math
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from passdeploy.reporting import schema as s
from passdeploy.reporting.fields import MAX_SAMPLES, ranked_samples
from passdeploy.reporting.files import SCHEMA_FILE, json_schema, parse_report
from tests.reporting.variants import STATUSES, data, variant

CONTRACT = {
    "schema", "status", "target", "budget", "method", "seed", "dense", "pruned", "speedup", "predictor", "equivalence",
    "timing_s", "environment",
}  # fmt: skip


def test_published_schema_is_generated_from_the_models() -> None:
    published = json.loads(SCHEMA_FILE.read_text())
    assert published == json.loads(json.dumps(json_schema())), "run: python -m passdeploy.reporting.files"
    jsonschema.Draft202012Validator.check_schema(published)
    assert set(published["required"]) == CONTRACT


@pytest.mark.parametrize("status", STATUSES)
def test_every_status_validates_against_the_published_schema(status: str) -> None:
    report = variant(status)
    written = report.to_json()
    jsonschema.validate(written, json.loads(SCHEMA_FILE.read_text()))
    assert set(written) >= CONTRACT
    assert parse_report(json.loads(json.dumps(written))) == report


@pytest.mark.parametrize("key", sorted(CONTRACT))
def test_published_schema_demands_every_key_of_the_contract(key: str) -> None:
    d = data()
    del d[key]
    with pytest.raises(jsonschema.ValidationError, match=key):
        jsonschema.validate(d, json_schema())


def test_published_schema_allows_keys_of_later_versions_and_refuses_wrong_types() -> None:
    d = data()
    d["later"] = d["target"]["later"] = 1
    jsonschema.validate(d, json_schema())
    d["dense"]["latency_ms"]["p50"] = "fast"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(d, json_schema())


def test_not_a_number_becomes_null_where_null_is_allowed_and_is_refused_elsewhere() -> None:
    curve = s.Curve(step=[0, 1, 2], series={"loss": [1.0, math.nan, math.inf]})
    assert curve.series["loss"] == [1.0, None, None]
    assert s.Speedup(latency=math.nan, latency_ci95=None, macs=1.0, realisation=None).latency is None
    with pytest.raises(ValidationError):
        s.NetworkInfo(accuracy=0.5, macs=math.nan, params=1, latency_ms=None)


def test_an_interval_with_an_open_end_is_no_interval() -> None:
    speedup = s.Speedup(latency=2.0, latency_ci95=(0.0, math.inf), macs=2.0, realisation=1.0)
    assert speedup.latency_ci95 is None


def test_writers_cannot_add_unknown_keys() -> None:
    with pytest.raises(ValidationError, match="shar"):
        s.GroupInfo(name="g", kind="channel", units=4, kept=2, shar=1)  # type: ignore[call-arg]


def _changed(**changes: Any) -> dict[str, Any]:
    d = data()
    for place, value in changes.items():
        *parents, last = place.split("__")
        node = d
        for parent in parents:
            node = node[parent]
        node[last] = value
    return d


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target__attached": False}, "not attached"),
        ({"status": "unverified"}, "unverified"),
        ({"pruned__latency_ms": None}, "within_budget needs"),
        ({"pruned": None}, "within_budget needs"),
        ({"dense__latency_ms": None, "status": "over_budget"}, "over_budget needs"),
    ],
)
def test_claims_need_their_measurement(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        s.Report.model_validate(_changed(**changes))


@pytest.mark.parametrize(
    "section",
    [
        {"layers": [{"name": "conv1", "dense_ms": 0.2, "pruned_ms": 0.1}]},
        {"accuracy_points": [{"label": "dense", "kind": "dense", "accuracy": 0.9, "latency_ms": 0.5}]},
        {"masked": {"kernel": False, "masked_vs_thin": 0.0, "dense": None, "masked": None, "thin": None, "speedup": 1}},
    ],
)
def test_no_section_claims_a_latency_of_what_is_not_attached(section: dict[str, Any]) -> None:
    written = variant("unverified").to_json()
    s.Report.model_validate(written)
    with pytest.raises(ValidationError, match="not attached"):
        s.Report.model_validate(written | section)
    assert s.Report.model_validate(data() | section)


def test_sections_that_contradict_themselves_are_refused() -> None:
    with pytest.raises(ValidationError, match="keeps 5 of 4"):
        s.GroupInfo(name="g", kind="channel", units=4, kept=5)
    with pytest.raises(ValidationError, match="2 values for 3 steps"):
        s.Curve(step=[0, 1, 2], series={"loss": [1.0, 2.0]})
    with pytest.raises(ValidationError):
        s.Distribution(dense=[1.0] * 501, pruned=[])
    with pytest.raises(ValidationError):
        s.PromptInfo(kind="additive", width=3, size=(32, 32), png="javascript:alert(1)")


def test_a_distribution_keeps_as_many_calls_as_a_report_holds() -> None:
    both = s.Distribution.of([0.5 + i / 1e4 for i in range(3000)], [0.25] * 3000)
    assert len(both.dense) == len(both.pruned) == 500
    assert (min(both.dense), max(both.dense)) == (0.5, 0.7999)


def test_optional_sections_that_are_absent_are_left_out() -> None:
    d = data()
    del d["prompt"]
    assert "prompt" not in parse_report(d).to_json()
    assert parse_report(d | {"pruned": None, "status": "infeasible"}).to_json()["pruned"] is None


@given(st.lists(st.floats(min_value=1e-3, max_value=1e3) | st.just(math.nan), max_size=1200))
def test_samples_are_thinned_out_evenly_with_both_ends(values: list[float]) -> None:
    finite = [v for v in values if math.isfinite(v)]
    kept = ranked_samples(values)
    assert len(kept) == min(len(finite), MAX_SAMPLES)
    assert kept == sorted(kept)
    if finite:
        assert kept[0] == pytest.approx(min(finite), rel=1e-4)
        assert kept[-1] == pytest.approx(max(finite), rel=1e-4)


def test_exit_status_follows_the_status() -> None:
    assert [status for status in STATUSES if variant(status).goal_met] == ["within_budget", "unverified"]
