"""What hangs on each group: the same numbers in the report and in `passdeploy groups`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from passdeploy.config import make_config
from passdeploy.shares import latency_shares, mac_shares
from passdeploy.subject import load_subject
from tests import scripted


class Linear:
    """A millisecond per unit, and one that nothing saves."""

    def predict_many(self, w: np.ndarray) -> np.ndarray:
        milliseconds: np.ndarray = 1 + w.sum(1)
        return milliseconds


def test_the_latency_that_a_group_can_save_ends_at_its_least_and_fixed_width() -> None:
    groups = load_subject(make_config({"model": "tiny-resnet", "data": "stripes"}), data=scripted.data()).groups
    depth = next(group for group in groups.groups if group.kind == "depth")
    free, bound, fixed = [group for group in groups.groups if group.kind == "channel" and group.units > 4][:3]
    given = [depth, free, replace(bound, least=4), replace(fixed, fixed=fixed.units)]
    total = 1 + sum(group.units for group in given)
    saved = [1, free.units - 1, bound.units - 4, 0]
    assert latency_shares(replace(groups, groups=tuple(given)), Linear()) == pytest.approx([s / total for s in saved])


def test_an_operator_counts_for_every_group_that_it_touches() -> None:
    subject = load_subject(make_config({"model": "tiny-resnet", "data": "stripes"}), data=scripted.data())
    shares = mac_shares(subject.groups, subject.operators)
    assert len(shares) == len(subject.groups.groups) and all(0 < share < 1 for share in shares) and sum(shares) > 1
