"""What a report says of accuracy and latency, and of why the one did not follow from the other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

from passdeploy.compared import accuracy_points
from passdeploy.explain import _padding, why_not_faster
from passdeploy.groups import Operator, macs
from passdeploy.latency.profile import keep_first
from tests import scripted


@pytest.mark.parametrize(
    ("widths", "speedups", "said"),
    [
        ("dense", (1.003, 1.0), ""),
        ("dense", (0.997, 1.0), ""),
        ("narrow", (1.9, 2.0), ""),
        ("narrow", (2.2, 2.0), "moves less memory"),
        ("shallow", (2.2, 2.0), "whole blocks were removed"),
    ],
)
def test_blocks_are_named_only_where_some_are_gone(
    single: Path, widths: str, speedups: tuple[float, float], said: str
) -> None:
    weights = yaml.safe_load((single / "config.yaml").read_text())["weights"]
    running = scripted.start(single, weights=weights)
    groups = running.subject.groups
    depth = np.array([group.kind == "depth" for group in groups.groups])
    units = np.array([group.units for group in groups.groups])
    narrow = np.where(depth, 1, units // 2)
    chosen = {"dense": units, "narrow": narrow, "shallow": np.where(depth, 0, units)}[widths]
    texts = [reason.text for reason in why_not_faster(running, keep_first(groups, chosen), *speedups)]
    faster = [text for text in texts if "faster than its MACs say" in text]
    assert len(faster) == bool(said)
    assert all(said in text for text in faster)


def test_the_launch_floor_is_its_share_of_what_was_measured(single: Path) -> None:
    weights = yaml.safe_load((single / "config.yaml").read_text())["weights"]
    running = scripted.start(single, weights=weights)
    dense = running.subject.groups.dense()
    measured, predicted = (
        next(reason for reason in why_not_faster(running, dense, 1.0, 1.0, ms) if "Launch floor" in reason.text)
        for ms in (2.0, None)
    )
    assert measured.share == predicted.share and measured.share is not None
    assert measured.value == pytest.approx(2.0 * measured.share)
    assert measured.value != predicted.value


def test_a_depthwise_convolution_is_padded_once() -> None:
    """Its channels are inputs and outputs at the same time, and each output is a sum over one of them."""
    at, owned = ((1, 1), 96, (8, 8), (8, 8), 96, 96), ((0, 1),)
    deep = Operator("deep", "depthwise", (3, 3), *at, owned, owned, (), 0, 0)
    wide = Operator("wide", "conv", (1, 1), (1, 1), 1, (8, 8), (8, 8), 64, 64, (), (), (), 64, 64)
    widths = np.array([40.0])
    assert _padding((deep,), widths, 16) == pytest.approx(1 - 40 / 48)
    useful = float(macs((deep, wide), widths))
    assert _padding((deep, wide), widths, 16) == pytest.approx(1 - useful / (useful + 8 * 9 * 64))


def test_points_stand_at_the_percentile_of_the_budget() -> None:
    dense = {"accuracy": {"test": 0.9}, "macs": 2.0}
    thin = {"accuracy": {"test": 0.8}, "macs": 1.0, "accuracy_before": 0.5}
    bench = {"measured": True, "dense": {"p50": 4.0, "p99": 8.0}, "thin": {"p50": 2.0, "p99": 6.0}}
    assert [point.latency_ms for point in accuracy_points(dense, thin, bench, "p50")] == [4.0, 2.0, 2.0]
    assert [point.latency_ms for point in accuracy_points(dense, thin, bench, "p99")] == [8.0, 6.0, 6.0]
