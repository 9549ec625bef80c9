from __future__ import annotations

import json
import math
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from passdeploy.errors import BadInput
from passdeploy.latency import regression
from passdeploy.latency.model import LatencyModel
from passdeploy.latency.nnls import nnls
from passdeploy.latency.profile import varied_widths
from passdeploy.latency.regression import cross_validate
from tests.latency.nets import machine_ms, resnet20

DATA = Path(__file__).parent / "data" / "resnet20_onnxruntime.json"


@pytest.fixture(scope="module")
def made_up():
    groups, ops = resnet20()
    units = np.array(list(groups.units.values()))
    widths = np.stack(list(islice(varied_widths(groups, 0, odd=0.1), 160)))
    ms = np.array([machine_ms(ops, units, w) for w in widths])
    return ops, units, widths, ms, machine_ms(ops, units, units)


@pytest.fixture(scope="module")
def model(made_up):
    ops, units, widths, ms, dense = made_up
    return LatencyModel.fit(ops, units, widths[:80], ms[:80] / dense, dense)


def test_nnls_is_least_squares_where_that_is_positive_and_zero_elsewhere():
    rng = np.random.default_rng(0)
    for _ in range(20):
        a = rng.random((40, 8))
        truth = np.maximum(rng.normal(size=8), 0)
        b = a @ truth + rng.normal(0, 0.01, 40)
        x = nnls(a.T @ a, a.T @ b)
        gradient = a.T @ (b - a @ x)
        assert (x >= 0).all() and np.abs(gradient[x > 0]).max() < 1e-8 and gradient.max() < 1e-8


def test_it_finds_a_machine_it_can_express(made_up, model):
    _, _, widths, ms, _ = made_up
    error = np.abs(model.predict_many(widths[80:].astype(float)) / ms[80:] - 1)
    assert model.step == 16 and error.mean() < 0.005 and error.max() < 0.03


def test_it_predicts_measured_engines_of_onnx_runtime():
    groups, ops = resnet20()
    data = json.loads(DATA.read_text())
    widths = np.array([w for w, _ in data["samples"]], dtype=float)
    ratios = np.array([r for _, r in data["samples"]])
    fitted = LatencyModel.fit(ops, list(groups.units.values()), widths[:60], ratios[:60], data["dense_ms"])
    error = np.abs(fitted.ratios_many(widths[60:]) / ratios[60:] - 1)
    assert fitted.step == 16  # AVX-512: sixteen floats a vector
    assert error.mean() < 0.01 and error.max() < 0.04
    assert fitted.mape < 0.01 and abs(fitted.mape - error.mean()) < 0.005


@pytest.mark.parametrize("noise", [0.0, 0.03, 0.06])
@pytest.mark.parametrize("number", [24, 36])
def test_odd_widths_of_which_the_sample_tells_nothing_are_not_made_up(made_up, number, noise):
    ops, units, widths, ms, dense = made_up
    even = [i for i, w in enumerate(widths) if not (w[w > 1] % 4).any()][:number]
    ratios = ms[even] / dense * np.random.default_rng(1).lognormal(0, noise, number)
    fitted = LatencyModel.fit(ops, units, widths[even], ratios, dense)
    less = np.random.default_rng(2).integers(0, 4, (40, len(units)))
    odd = np.where(units > 1, units - less, units)
    truth = np.array([machine_ms(ops, units, w) for w in odd]) / dense
    assert np.abs(fitted.ratios_many(odd) / truth - 1).max() < 0.15


def test_quick_cost_is_the_sum_of_the_terms(made_up, model):
    _, _, widths, _, _ = made_up
    features = model.features
    terms = features.terms(widths)
    coefficients = np.random.default_rng(0).random(terms.shape[1:]) / (1 + terms.max(axis=(0, 1)))
    slow = (terms * coefficients).sum((1, 2))
    np.testing.assert_allclose(features.cost(widths.astype(float), coefficients), slow, rtol=1e-12)


def test_widths_inside_a_removed_block_do_not_matter(made_up, model):
    groups, _ = resnet20()
    units = list(groups.units.values())
    w = np.array(units, dtype=float)
    block = groups.names.index("depth:layer2.1")
    w[block] = 0
    other = w.copy()
    other[groups.names.index("layer2.1.conv1")] = 8
    assert model.predict(w) == model.predict(other) < model.dense_ms


def test_more_is_never_faster_on_the_grid(made_up, model):
    _, units, _, _, _ = made_up
    rng = np.random.default_rng(1)
    for _ in range(50):
        w = np.array([rng.integers(0, 2) if u == 1 else 16 * rng.integers(1, u // 16 + 1) for u in units], dtype=float)
        for g, u in enumerate(units):
            if u > 1 and w[g] + 16 <= u:
                more = w.copy()
                more[g] += 16
                assert model.predict(more) >= model.predict(w) - 1e-12


def test_soft_prediction_agrees_on_the_grid_and_has_the_right_gradient(made_up, model):
    _, units, _, _, _ = made_up
    w = np.array([1 if u == 1 else u // 2 if u > 16 else u for u in units], dtype=float)
    soft = torch.tensor(w, requires_grad=True)
    value = model.predict_soft(soft)
    assert value.item() == pytest.approx(model.predict(w), rel=0.02)
    value.backward()
    assert (soft.grad >= 0).all() and (soft.grad > 0).sum() > len(units) * 0.9
    assert torch.autograd.gradcheck(model.predict_soft, torch.tensor(w * 0.93, requires_grad=True))
    assert model.predict_soft(torch.tensor(w, dtype=torch.float32)).dtype == torch.float32


def test_file_round_trip_and_refusals(tmp_path, made_up, model):
    ops, units, widths, _, _ = made_up
    model.provenance["backend"] = "onnxruntime"
    path, beside = tmp_path / "a.profile.json", tmp_path / "a.profile.json.tmp"
    beside.write_text("of another run that saves the same profile")
    model.save(path)
    assert "another run" in beside.read_text()
    back = LatencyModel.load(path, ops, list(units))
    np.testing.assert_allclose(back.predict_many(widths.astype(float)), model.predict_many(widths.astype(float)))
    assert back.kind == "profile" and back.mape == model.mape and back.provenance["backend"] == "onnxruntime"
    assert back.summary()["n"] == 80
    data = json.loads(path.read_text())
    for change, why in (
        ({"schema": "x"}, "schema"),
        ({"operators": "0" * 64}, "another network"),
        ({"samples": [*data["samples"][:-1], {"kept": [1], "ratio": 1.0}]}, "malformed"),
        ({"samples": [{"kept": s["kept"], "ratio": -1.0} for s in data["samples"]]}, "above zero"),
        ({"dense_ms": None}, "malformed"),
        ({"dense_ms": math.inf}, "above zero"),
        ({"step": 0}, "malformed|can't be"),
        ({"step": -8}, "can't be"),
        ({"step": math.inf}, "malformed"),
        ({"ridge": 0.0}, "can't be"),
        ({"bytes_per_weight": 0}, "can't be"),
        ({"samples": [s | {"kept": [-1, *s["kept"][1:]]} for s in data["samples"]]}, "can't be"),
        ({"samples": [s | {"kept": [math.nan, *s["kept"][1:]]} for s in data["samples"]]}, "can't be"),
        ({"samples": [s | {"kept": [2 * k for k in s["kept"]]} for s in data["samples"]]}, "can't be"),
        ({"samples": [s | {"trust": 0} for s in data["samples"]]}, "can't be"),
        ({"samples": [s | {"trust": math.nan} for s in data["samples"]]}, "can't be"),
        ({"error": data["error"] | {"mape": math.nan}}, "malformed"),
        ({"error": data["error"] | {"max_ape": "2 %"}}, "malformed"),
        ({"error": data["error"] | {"repeatability": -1.0}}, "malformed"),
    ):
        path.write_text(json.dumps(data | change))
        with pytest.raises(BadInput, match=why) as caught:
            LatencyModel.load(path, ops, list(units))
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    path.write_text("{")
    with pytest.raises(BadInput, match="cannot be read"):
        LatencyModel.load(path, ops, list(units))


def test_the_error_of_a_model_of_another_form_is_found_anew(made_up, model):
    """What an earlier version made of the same samples was another model."""
    ops, units, _, _, _ = made_up
    told = model.to_json()
    told["error"] = {**told["error"], "mape": 0.5, "max_ape": 0.9}
    assert LatencyModel.from_json(told, ops, list(units)).mape == 0.5
    del told["form"]
    again = LatencyModel.from_json(told, ops, list(units))
    assert again.mape == pytest.approx(model.mape) and again.max_ape == pytest.approx(model.max_ape)
    assert again.repeatability == model.repeatability


def test_what_is_left_out_has_no_say_in_the_weights_of_the_others(made_up, monkeypatch):
    ops, units, widths, ms, dense = made_up
    robust, seen = regression._robust, []

    def watched(columns, *rest):
        seen.append(len(columns))
        return robust(columns, *rest)

    monkeypatch.setattr(regression, "_robust", watched)
    cross_validate(ops, list(units), widths[:80].astype(float), ms[:80] / dense, np.ones(80), [8], 4)
    assert seen == [64] * 5


def test_too_few_structures(made_up):
    ops, units, widths, ms, dense = made_up
    with pytest.raises(BadInput, match="at least 10"):
        LatencyModel.fit(ops, units, widths[:9], ms[:9] / dense, dense)
