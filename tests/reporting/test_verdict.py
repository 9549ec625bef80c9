# ruff: noqa: RUF001  (reports use real multiplication and minus signs)
from __future__ import annotations

import re

import pytest

from passdeploy.reporting import format as f
from passdeploy.reporting import verdict as verdict_module
from passdeploy.reporting.files import parse_report
from passdeploy.reporting.html import render_html
from passdeploy.reporting.markdown import render_markdown
from passdeploy.reporting.verdict import checks, numbers, proofs, removed_with_block, verdict
from passdeploy.stages.proof import proof_holds
from tests.reporting.variants import STATUSES, data, variant


@pytest.mark.parametrize(
    ("status", "tone", "headline", "detail"),
    [
        (
            "within_budget",
            "good",
            "2.07× faster at −0.59 points of top-1 accuracy",
            "2.07× (95 %: 2.05 to 2.08) against 2× (291 µs), measured",
        ),
        ("over_budget", "bad", "still over the budget", "281 µs against a budget of 250 µs at p50, measured"),
        ("infeasible", "bad", "No structure of this network reaches 12×", "91.0 µs (6.40×), measured"),
        ("unverified", "warn", "Predicted 2.07× by an analytic roofline, not measured", "Nothing was measured"),
        ("not_equivalent", "bad", "The proof failed (thin = ONNX, top-1 agreement)", "Nothing was shipped"),
        ("accuracy_below_floor", "bad", "not accurate enough", "validation images is 92.81 %, below the 93.00 %"),
    ],
)
def test_each_status_has_its_own_headline(status: str, tone: str, headline: str, detail: str) -> None:
    said = verdict(variant(status))
    assert (said.tone, said.label) == (tone, status.replace("_", " "))
    assert headline in said.headline
    assert detail in said.detail


def test_a_predicted_infeasible_budget_says_that_it_is_predicted() -> None:
    d = variant("infeasible").to_json()
    d["reachable"]["measured"] = False
    assert "predicted, nothing was measured" in verdict(parse_report(d)).detail
    del d["reachable"]
    assert "everything prunable is gone" in verdict(parse_report(d)).detail


@pytest.mark.parametrize(
    ("ratio", "interval", "said"),
    [
        (2.03, [1.93, 2.08], "2.03× (95 %: 1.93 to 2.08) against 2× (291 µs), measured. The lower end"),
        (1.998, [1.98, 2.01], "1.998× (95 %: 1.98 to 2.01) against 2× (291 µs), measured. The closed loop had"),
    ],
)
def test_over_budget_says_whether_the_ratio_or_its_interval_decided(
    ratio: float, interval: list[float], said: str
) -> None:
    d = data() | {"status": "over_budget"}
    d["speedup"] |= {"latency": ratio, "latency_ci95": interval}
    assert said in verdict(parse_report(d)).detail


def test_what_is_fast_enough_once_is_not_called_out_of_reach() -> None:
    d = variant("infeasible").to_json()
    d["reachable"]["speedup"] = 12.1
    assert "(12.10×), measured, but not steadily enough to count on it" in verdict(parse_report(d)).detail


@pytest.mark.parametrize(("latency_ms", "said"), [(0.249, True), (0.251, False)])
def test_what_is_inside_a_time_once_is_not_called_out_of_reach(latency_ms: float, said: bool) -> None:
    d = variant("infeasible").to_json()
    d["budget"] = {**d["budget"], "asked": "250us", "latency_ms": 0.25, "speedup": None}
    d["reachable"] |= {"latency_ms": latency_ms, "measured": True}
    assert ("not steadily enough to count on it" in verdict(parse_report(d)).detail) == said


def test_a_dense_engine_inside_the_budget_is_shipped_as_it_is() -> None:
    d = data()
    d["pruned"] = d["dense"]
    d["speedup"] = {"latency": 1.0, "latency_ci95": [0.99, 1.01], "macs": 1.0, "realisation": 1.0}
    said = verdict(parse_report(d))
    assert said.headline == "The dense network is already inside the budget"
    assert "shipped as it is" in said.detail


def test_a_dense_engine_that_is_not_accurate_enough_was_not_made_so_by_pruning() -> None:
    d = variant("accuracy_below_floor").to_json()
    d["pruned"] = d["dense"]
    d["speedup"] = {"latency": 0.99, "latency_ci95": [0.98, 1.01], "macs": 1.0, "realisation": 0.99}
    report = parse_report(d)
    assert verdict(report).headline == "The dense network is inside the budget, but not accurate enough"
    assert "<b>1.01×</b> slower" in render_html(report)


def test_a_metric_keeps_its_own_capitals() -> None:
    d = variant("accuracy_below_floor").to_json()
    d["provenance"]["metric"] = "mAP"
    assert verdict(parse_report(d)).detail.startswith("MAP on validation images")
    assert "Map" not in render_html(parse_report(d))


@pytest.mark.parametrize(("reached", "words"), [(0.2511, "251.1 µs"), (0.25004, "250.04 µs"), (0.26, "260 µs")])
def test_a_time_missed_narrowly_does_not_read_as_met(reached: float, words: str) -> None:
    d = variant("over_budget").to_json()
    d["budget"] |= {"asked": "251us", "latency_ms": 0.251} if reached == 0.2511 else {}
    d["pruned"]["latency_ms"]["p50"] = reached
    assert verdict(parse_report(d)).detail.startswith(f"{words} against a budget of")


def test_unverified_says_why_nothing_was_measured() -> None:
    d = variant("unverified").to_json()
    assert "NVIDIA A100 is not attached to this machine" in verdict(parse_report(d)).detail
    d["target"]["attached"] = True
    assert "TensorRT-RTX can't run engines for NVIDIA A100 here" in verdict(parse_report(d)).detail


def test_groups_inside_a_removed_block_are_gone_whatever_their_masks_say() -> None:
    d = data()
    for group in d["groups"]:
        if group["kind"] == "channel":
            group["kept"] = group["units"]
    inner = {"layer1.1.conv1", "layer2.2.conv1", "layer3.1.conv1"}
    report = parse_report(d)
    assert report.groups is not None
    assert removed_with_block(report.groups) == inner
    assert render_markdown(report).count("with its block") == 3
    assert len(re.findall("with its block</td>", render_html(report))) == 3


@pytest.mark.parametrize(
    ("asked", "percentile", "words"),
    [
        ("2x", "p50", "2× (291 µs)"),
        ("2x", "p99", "2×"),
        ("291us", "p50", "291 µs at p50"),
        ("291us", "p99", "291 µs at p99"),
    ],
)
def test_a_speed_up_has_no_percentile(asked: str, percentile: str, words: str) -> None:
    """It is judged by the medians of blocks; what half of the dense engine's p99 would be decides nothing."""
    d = data()
    d["budget"].update(asked=asked, percentile=percentile)
    assert verdict_module.asked(parse_report(d)) == words


def test_slower_is_called_slower() -> None:
    d = variant("over_budget").to_json()
    d["speedup"].update(latency=0.8, latency_ci95=[0.79, 0.81])
    assert verdict(parse_report(d)).headline.startswith("1.25× slower")


def test_each_proof_is_held_against_the_bound_of_its_precision() -> None:
    # fp16, bound 1e-2: masked, thin and ONNX are compared in fp32 all the same, as in what decides.
    d = variant("unverified").to_json()
    assert [check.ok for check in proofs(parse_report(d))] == [True, True, None, True]
    d["equivalence"].update(thin_vs_onnx=1e-3, onnx_vs_engine=1e-3)
    assert [check.ok for check in proofs(parse_report(d))] == [True, False, True, True]
    d["equivalence"]["masked_vs_thin"] = 1e-3
    assert [check.ok for check in proofs(parse_report(d))] == [False, False, True, True]
    assert not proof_holds({**d["equivalence"], "masked_vs_thin": 0.0})
    d["equivalence"]["top1_agreement"] = 0.98
    assert proofs(parse_report(d))[3].ok is False


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_card_names_the_bound_of_each_step(precision: str) -> None:
    d = variant("unverified" if precision == "fp16" else "within_budget").to_json()
    wanted = {"fp32": "at most 1e-04 at fp32", "fp16": "at most 1e-04, and 1e-02 for the engine at fp16"}
    assert wanted[precision] in render_html(parse_report(d))


def test_a_percentile_that_could_not_be_told_is_no_dash() -> None:
    d = variant("over_budget").to_json()
    d["budget"]["percentile"] = "p99"
    d["pruned"]["latency_ms"]["p99"] = None
    assert verdict(parse_report(d)).detail.startswith(
        "Too few calls were timed to tell p99, against a budget of 250 µs"
    )


def test_a_health_warning_fails_nothing() -> None:
    warned = [check for check in checks(variant("within_budget")) if check.ok is False]
    assert [check.name for check in warned] == ["health: collapse"]
    assert all(check.warning for check in warned)


def test_the_first_check_is_the_status() -> None:
    outcomes = {status: checks(variant(status))[0].ok for status in STATUSES}
    assert outcomes == {status: status == "within_budget" for status in STATUSES} | {"unverified": None}


def test_no_latency_is_shown_where_none_was_measured() -> None:
    rows = {row[0]: row[1:] for row in numbers(variant("unverified"))}
    assert rows["latency"] == ("not measured", "not measured", "")
    assert rows["predicted latency (analytic)"] == ("122 µs", "58.9 µs", "2.07×")


@pytest.mark.parametrize(
    ("got", "expected"),
    [
        (f.milliseconds(0.2811), "281 µs"),
        (f.milliseconds(4.1), "4.10 ms"),
        (f.milliseconds(123.4), "123 ms"),
        (f.milliseconds(12_345.0), "12.3 s"),
        (f.milliseconds(0.0), "0 µs"),
        (f.milliseconds(None), f.NONE),
        (f.beside(1.004, 1.0), "1.004 ms"),
        (f.beside(1.0, 1.0), "1.00 ms"),
        (f.beside(2.0, 1.0), "2.00 ms"),
        (f.beside(2.0, None), "2.00 ms"),
        (f.beside(None, 1.0), f.NONE),
        (f.seconds(9.74), "9.7 s"),
        (f.seconds(88.1), "1 min 28 s"),
        (f.seconds(7500), "2 h 5 min"),
        (f.count(41_214_848), "41.2 M"),
        (f.count(4.1e9), "4.10 G"),
        (f.count(12), "12"),
        (f.percent(0.9272), "92.72 %"),
        (f.points(-0.0059), "−0.59 points"),
        (f.points(0.002), "+0.20 points"),
        (f.points(-0.00001), "±0.00 points"),
        (f.times(2.068), "2.07×"),
        (f.interval((2.051, 2.083)), "2.05 to 2.08"),
        (f.tiny(0.0), "0"),
        (f.tiny(1.9e-6), "1.9e-06"),
    ],
)
def test_numbers_read_well(got: str, expected: str) -> None:
    assert got == expected
