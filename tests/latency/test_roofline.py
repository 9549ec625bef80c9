from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from passdeploy.groups import Groups, find_groups, macs, operators
from passdeploy.latency.features import Features
from passdeploy.latency.roofline import MACHINES, Roofline
from passdeploy.models import build
from passdeploy.targets import DEVICES, Target
from tests.latency.nets import resnet20

GROUPS, OPS = resnet20()
UNITS = np.array(list(GROUPS.units.values()), dtype=float)


def target(name, precision="fp16", batch=1, threads=1):
    device = DEVICES[name]
    precision = "fp32" if name == "cpu" else precision
    return Target(name, device.title, device.compute_capability, "tensorrt", precision, batch, threads, False)


def test_every_gpu_target_has_a_machine():
    assert set(MACHINES) == set(DEVICES) - {"cpu"}


@pytest.mark.parametrize("name", sorted(MACHINES))
def test_rates_of_8_bits_are_twice_those_of_16_or_the_same(name):
    """All of them with sums in fp32: data sheets also give those with sums in fp16."""
    rate = MACHINES[name].rate
    assert rate["fp8"] == rate["fp16"] or rate["fp8"] == pytest.approx(2 * rate["fp16"], rel=0.05)


@pytest.mark.parametrize("name", sorted(DEVICES))
@pytest.mark.parametrize("batch", [1, 64])
def test_predictions_are_sane(name, batch):
    model = Roofline(OPS, UNITS, target(name, batch=batch))
    half = np.where(UNITS > 1, UNITS // 2, 1)
    without = np.where(UNITS > 1, UNITS, 0)
    both = np.array([UNITS, half, without])
    dense, narrow, shallow = model.predict_many(both)
    assert dense == pytest.approx(model.dense_ms) and 0 < narrow < dense and 0 < shallow < dense
    assert model.summary()["kind"] == "analytic" and model.summary()["mape"] is None


def test_batches_cost_more_and_images_less():
    one, many = (Roofline(OPS, UNITS, target("a100", batch=b)).dense_ms for b in (1, 256))
    assert one < many < 256 * one


def test_small_networks_are_launch_bound_on_a_large_gpu():
    # halving every width saves little, leaving blocks out saves in proportion
    model = Roofline(OPS, UNITS, target("h100"))
    half, without = np.where(UNITS > 1, UNITS // 2, 1), np.where(UNITS > 1, UNITS, 0)
    assert model.predict(half) > 0.8 * model.dense_ms > model.predict(without)


def test_width_is_a_staircase_on_tensor_cores_and_soft_prediction_a_slope():
    model = Roofline(OPS, UNITS, target("t4", batch=256))
    g = GROUPS.names.index("layer3.1.conv1")

    def at(width):
        w = UNITS.copy()
        w[g] = width
        return w

    assert model.predict(at(33)) > model.predict(at(32))
    w = torch.tensor(at(40), requires_grad=True)
    model.predict_soft(w).backward()
    assert w.grad[g] > 0 and (w.grad >= 0).all()
    assert model.predict_soft(torch.tensor(UNITS)).item() <= model.dense_ms * 1.0001


def test_more_is_never_faster():
    rng = np.random.default_rng(0)
    for name in ("a100", "cpu"):
        model = Roofline(OPS, UNITS, target(name))
        for _ in range(100):
            w = np.array([rng.integers(0, 2) if u == 1 else rng.integers(1, u + 1) for u in UNITS], dtype=float)
            more = np.minimum(w + rng.integers(0, 9, len(w)) * (UNITS > 1), UNITS)
            assert model.predict(more) >= model.predict(w) * (1 - 1e-9)


@pytest.mark.parametrize(
    ("name", "published_ms"),
    # A100, INT8, batch 1, TensorRT 8.4: NVIDIA, "TensorFlow Quantization Toolkit, Model Zoo Results"
    [("resnet50", 0.45), ("resnet101", 0.84), ("mobilenet_v2", 0.30)],
)
def test_the_order_of_magnitude_is_that_of_published_engines(name, published_ms):
    model = build(name, 1000).eval()
    example = torch.randn(1, 3, 224, 224)
    roofline = Roofline(operators(model, example, Groups(())), [], target("a100", precision="int8"))
    assert published_ms / 1.5 < roofline.dense_ms < published_ms * 1.5


def test_a_hundred_candidates_are_predicted_at_once():
    model = Roofline(OPS, UNITS, target("a100"))
    many = np.repeat(UNITS[None], 100, axis=0)
    values = model.predict_many(many)
    assert values.shape == (100,) and np.allclose(values, model.dense_ms)


def test_a_transposed_convolution_multiplies_once_per_input_pixel():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(16, 8, 2, stride=2),
                            nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1)).eval()  # fmt: skip
    example = torch.rand(1, 3, 16, 16)
    groups = find_groups(network, example)
    found = operators(network, example, groups)
    features = Features(found, list(groups.units.values()), 1)
    units = np.array(list(groups.units.values()), dtype=float)
    assert features.terms(units[None])[0, :, 0].sum() == pytest.approx(float(macs(found)))
    assert any(family.startswith("transposed ") for family in features.families)
