from __future__ import annotations

import numpy as np
import pytest
import torch

from passdeploy.groups import find_groups, macs, operators
from passdeploy.latency.measure import Measurement
from passdeploy.models.cifar_resnet import resnet20
from passdeploy.reporting.convert import distribution_section, group_sections, latency_section
from passdeploy.reporting.files import parse_report
from passdeploy.reporting.html import render_html
from passdeploy.structure import Structure
from tests.reporting.variants import data


def measurement(median: float, n: int = 3000) -> Measurement:
    samples = np.random.default_rng(0).normal(median, median / 50, n)
    return Measurement(median, median * 1.02, None, median, n, 0.01, 40, 2, tuple(samples.tolist()))


def test_measurements_become_sections() -> None:
    latency = latency_section(measurement(0.5), enqueue_ms=0.1)
    assert (latency.p50, latency.p99, latency.n, latency.disturbed_blocks) == (0.5, None, 3000, 2)
    assert latency.enqueue_ms == 0.1
    both = distribution_section(measurement(0.5), measurement(0.25))
    assert len(both.dense) == len(both.pruned) == 500
    assert max(both.pruned) < min(both.dense)


def test_groups_of_a_real_network_are_drawn() -> None:
    model, example = resnet20(num_classes=10), torch.zeros(1, 3, 32, 32)
    groups = find_groups(model, example)
    ops = operators(model, example, groups)
    depth = next(group for group in groups.groups if group.kind == "depth")
    inner = groups.inner(depth)
    masks = dict(groups.dense().masks)
    masks[depth.name] = (False,)
    other = next(group for group in groups.groups if group.kind == "channel" and group.name not in inner)
    masks[other.name] = tuple(i < 4 for i in range(other.units))
    sections = {g.name: g for g in group_sections(groups, Structure(masks), ops, {depth.name: 0.1})}
    assert list(sections) == list(groups.names)
    assert sections[other.name].kept == 4
    assert sections[depth.name].kept == 0
    assert inner
    assert all(sections[name].kept == 0 for name in inner), "inside a removed block nothing is left"
    assert sections[depth.name].share_latency == 0.1
    lost = macs(ops) - macs(ops, [0.0 if g is depth else float(g.units) for g in groups.groups])
    assert sections[depth.name].share_macs == pytest.approx(lost / macs(ops))
    d = data() | {"groups": [section.model_dump() for section in sections.values()]}
    page = render_html(parse_report(d))
    blocks = sum(g.kind == "depth" for g in groups.groups)
    assert f"{blocks - 1} of {blocks} blocks are left" in page
