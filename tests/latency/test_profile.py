from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from passdeploy.errors import BadInput, DenseFailed, NotWritten
from passdeploy.latency.log import MeasurementLog
from passdeploy.latency.profile import keep_first, profile, varied_widths
from tests.latency.nets import machine_ms, resnet20
from tests.latency.scripted import FakeClock

GROUPS, OPS = resnet20()
UNITS = np.array(list(GROUPS.units.values()))


def widths_of(structure):
    return np.array([sum(mask) for mask in structure.masks.values()], dtype=float)


class Bench:
    """Measures on the made-up machine; every measurement takes `seconds`."""

    def __init__(self, noise=0.0, seconds=0.1):
        self.noise, self.seconds, self.count = noise, seconds, 0
        self.clock = FakeClock()
        self.dense = machine_ms(OPS, UNITS, UNITS)

    def __call__(self, structure):
        rng = np.random.default_rng(self.count)
        self.count += 1
        self.clock.now += self.seconds
        thin = machine_ms(OPS, UNITS, widths_of(structure)) * rng.lognormal(0, self.noise)
        return {"ratio": thin / self.dense, "dense_ms": self.dense, "thin_ms": thin}


def run(bench, path=None, **kwargs):
    log = MeasurementLog(path, clock=bench.clock)
    return profile(bench, OPS, GROUPS, log=log, **{"good_enough": 0.0, **kwargs}), log


def test_structures_are_varied_legal_and_reproducible():
    stream = list(islice(varied_widths(GROUPS, 0), 200))
    widths = np.stack(stream)
    depth = UNITS == 1
    assert (widths <= UNITS).all() and (widths[:, ~depth] >= 1).all() and (widths[:, depth] >= 0).all()
    assert len({tuple(w) for w in stream}) > 195
    ratios = np.array([machine_ms(OPS, UNITS, w) for w in stream]) / machine_ms(OPS, UNITS, UNITS)
    assert ratios.min() < 0.2 and ratios.max() > 0.85
    on_grid = ((widths % 8 == 0) | (widths == UNITS))[:, ~depth].all(axis=1)
    assert 0.5 < on_grid.mean() < 0.95
    assert 0.1 < (widths[:, depth] == 0).mean() < 0.4
    np.testing.assert_array_equal(widths, np.stack(list(islice(varied_widths(GROUPS, 0), 200))))
    assert (widths[10:] != np.stack(list(islice(varied_widths(GROUPS, 1), 200)))[10:]).any()


def test_structures_keep_the_first_units():
    structure = keep_first(GROUPS, UNITS // 2 + UNITS % 2)
    np.testing.assert_array_equal(widths_of(structure), UNITS // 2 + UNITS % 2)
    assert structure.masks["layer1.0.conv1"] == (True,) * 8 + (False,) * 8


def test_profile_stops_when_the_time_is_up():
    bench = Bench()
    model, log = run(bench, budget_s=8.0)
    assert 70 <= bench.count <= 82 and abs(sum(r.seconds for r in log.records) - 8.0) < 1.0
    assert model.mape < 0.01 and model.repeatability == 0.0 and len(model.ratios) == bench.count - 6 + 1
    assert model.provenance["seed"] == 0 and model.dense_ms == pytest.approx(bench.dense)


def test_profile_ends_early_when_it_is_good_enough():
    bench = Bench()
    model, _ = run(bench, budget_s=100.0, good_enough=0.02)
    assert bench.count <= 66 and model.mape <= 0.02


def test_slow_measurements_still_give_a_model():
    bench = Bench(seconds=10.0)
    model, _ = run(bench, budget_s=30.0)
    assert 12 <= len(model.ratios) <= 25 and model.mape is not None


def test_repeatability_is_measured_not_assumed():
    model, _ = run(Bench(noise=0.02), budget_s=10.0)
    assert 0.005 < model.repeatability < 0.06


def test_a_killed_profile_continues_and_ends_as_the_undisturbed_one(tmp_path):
    whole, log = run(Bench(noise=0.01), tmp_path / "whole", budget_s=5.0)
    lines = (tmp_path / "whole").read_bytes().splitlines(keepends=True)
    for kept in (0, 7, 23, len(lines) - 2, len(lines)):
        (tmp_path / "part").write_bytes(b"".join(lines[:kept]))
        bench = Bench(noise=0.01)
        bench.count = kept  # the scripted noise goes on where it was
        model, again = run(bench, tmp_path / "part", budget_s=5.0)
        assert again.replayed == kept and bench.count == len(lines)
        np.testing.assert_array_equal(model.ratios, whole.ratios)
        assert model.to_json() == whole.to_json()
    assert len(log.records) == len(lines)


def test_measurements_of_a_disturbed_machine_count_less():
    class Disturbed(Bench):
        def __call__(self, structure):
            value = super().__call__(structure)
            if self.count % 4 == 0:  # a quarter of them while something else was running
                return {**value, "ratio": value["ratio"] * 1.4, "dense_floor_ms": self.dense * 1.3}
            return {**value, "dense_floor_ms": self.dense}

    bench = Disturbed()
    model, _ = run(bench, budget_s=8.0)
    truth = Bench()
    held_out = list(islice(varied_widths(GROUPS, 7), 60))[3:]
    ms = np.array([machine_ms(OPS, UNITS, w) for w in held_out])
    error = np.abs(model.predict_many(np.stack(held_out).astype(float)) / ms - 1)
    assert error.mean() < 0.02 and truth.dense == model.dense_ms


class Refuses(Bench):
    """Does not compile every structure: `refused` is asked with the number of those before."""

    def __init__(self, refused):
        super().__init__()
        self.refused = refused

    def __call__(self, structure):
        if self.refused(self.count):
            self.count += 1
            raise BadInput("engine: no kernel for this")
        return super().__call__(structure)


def test_a_structure_that_does_not_compile_is_left_out_and_not_tried_again(tmp_path):
    bench = Refuses(lambda count: count == 5)
    model, log = run(bench, tmp_path / "log", budget_s=5.0)
    assert [r.value.get("failed") for r in log.records].count("engine: no kernel for this") == 1
    assert len(model.ratios) == bench.count - 6 - 1 + 1 and np.isfinite(model.ratios).all()
    assert model.provenance["failed"] == 1
    again = Refuses(lambda count: True)
    same, replayed = run(again, tmp_path / "log", budget_s=5.0)
    assert again.count == 0 and replayed.replayed == len(log.records)
    assert same.to_json() == model.to_json()


@pytest.mark.parametrize("repeats", [0, 4])
def test_a_repeat_that_fails_costs_no_model(repeats):
    """The structure was measured before, and so were all others."""
    bench = Refuses(lambda count: count >= 30 + repeats)
    model, _ = run(bench, budget_s=1e6, most=30)
    assert len(model.ratios) == 31 and model.provenance["failed"] == 0
    assert model.repeatability == (0.0 if repeats else None)


def test_where_most_structures_do_not_compile_it_is_said_why(tmp_path):
    bench = Refuses(lambda count: count > 2)
    with pytest.raises(BadInput, match=r"11 of 14 structures cannot be measured \(engine: no kernel.*remove .*log"):
        run(bench, tmp_path / "log")
    assert bench.count == 14


@pytest.mark.parametrize("kind", [NotWritten, DenseFailed])
def test_a_full_disk_and_the_dense_engine_are_no_property_of_a_structure(tmp_path, kind):
    def failing(structure):
        raise kind("not its fault")

    with pytest.raises(kind):
        profile(failing, OPS, GROUPS, log=MeasurementLog(tmp_path / "log"))
    assert MeasurementLog(tmp_path / "log").records == ()


def test_builds_that_fail_take_of_the_time_too():
    """Each for as long as all that there is."""
    clock = [0.0]

    class Slow(Refuses):
        def __call__(self, structure):
            clock[0] += 30.0 if self.refused(self.count) else 1.0
            return super().__call__(structure)

    log = MeasurementLog(clock=lambda: clock[0])
    model = profile(Slow(lambda count: 36 <= count < 60), OPS, GROUPS, budget_s=42.0, log=log)
    assert model.provenance["failed"] == 1


def test_a_network_without_operators_is_refused():
    with pytest.raises(BadInput, match="no convolution"):
        profile(Bench(), (), GROUPS)


def test_a_network_of_few_structures_gets_a_model_of_all_of_them():
    """Three blocks that can go, and nothing else: there are no more than eight."""
    depth = [group.name for group in GROUPS.groups if group.kind == "depth"][:3]
    fixed = {group.name: group.units for group in GROUPS.groups if group.kind != "depth"}

    def streams(groups, seed):
        rng = np.random.default_rng(seed)
        while True:
            gone = [group.name in depth and rng.random() < 0.5 for group in groups.groups]
            yield np.where(gone, 0, UNITS)

    assert fixed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("passdeploy.latency.profile.varied_widths", streams)
        model, _ = run(Bench(), budget_s=1e6)
    assert len(model.ratios) == 8
    np.testing.assert_allclose(model.ratios_many(model.widths), model.ratios, rtol=0.05)
