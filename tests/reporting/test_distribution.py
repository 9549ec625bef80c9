"""The histograms of both engines' calls."""

from __future__ import annotations

from passdeploy.reporting.files import parse_report
from passdeploy.reporting.plots.distribution import distribution
from tests.reporting.variants import data


def test_calls_that_no_histogram_shows_are_told() -> None:
    report = data()
    assert "outside" not in str(distribution(parse_report(report)))
    calls = report["distribution"]["dense"]
    for index in range(0, len(calls), 8):  # a machine that is another's every eighth call
        calls[index] *= 20
    shown = str(distribution(parse_report(report)))
    assert shown.count("12% of calls lie outside") == 1 or shown.count("13% of calls lie outside") == 1
    assert "pruned, µs<" in shown
