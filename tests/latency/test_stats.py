from __future__ import annotations

import math

import numpy as np
import pytest

from passdeploy.latency.stats import Ratio, median_ranks, median_ratio, min_samples, percentile, spread


def test_min_samples_are_mlperfs():
    assert [min_samples(q) for q in (50, 90, 99)] == [11, 64, 662]


def test_percentile_is_a_nearest_rank_and_none_below_the_minimum():
    values = list(range(1, 101))[::-1]
    assert percentile(values, 50) == 50 and percentile(values, 90) == 90
    assert percentile(values, 99) is None
    assert percentile(values[:10], 50) is None and percentile(values[:11], 50) == 95


def test_spread_ignores_an_outlier():
    assert spread([1.0, 1.01, 0.99, 1.0, 9.0]) == pytest.approx(0.014826)
    assert spread([1.0]) == 0 and spread([0.0, 0.0]) == 0


def test_ranks_enclose_the_median():
    assert median_ranks(40, 0.95) == (13, 26)  # the textbook's 14th and 27th
    assert median_ranks(6, 0.95) == (0, 5) and median_ranks(5, 0.95) is None


def test_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        ratio = median_ratio(2 * np.exp(rng.standard_t(2, 40) * 0.05))
        covered += ratio.low <= 2 <= ratio.high
    assert covered >= 0.95 * 400 - 3 * math.sqrt(400 * 0.95 * 0.05)


def test_ratio_round_trip_and_inverse():
    for ratio in (median_ratio([2.0, 2.1, 1.9]), median_ratio(np.linspace(1.9, 2.1, 20))):
        assert Ratio.from_json(ratio.to_json()) == ratio
        assert ratio.inverse().value == pytest.approx(0.5, rel=0.01)
        assert ratio.inverse().low <= ratio.inverse().value <= ratio.inverse().high
    assert median_ratio([2.0, 2.1, 1.9]).low == 0
