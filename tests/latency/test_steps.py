from __future__ import annotations

import json

import numpy as np
import pytest

from passdeploy.latency.steps import (
    FAMILIES,
    STEPS,
    WIDTHS,
    Steps,
    cache_path,
    chain,
    find_step,
    from_table,
    steps_of,
    sweep,
)
from passdeploy.targets import resolve
from tests.latency.scripted import FakeClock, ScriptedRunner


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_a_staircase_is_recognised(step, noise):
    rng = np.random.default_rng(step)
    curve = [(w, (0.3 + np.ceil(w / step) * step / 64) * rng.lognormal(0, noise)) for w in WIDTHS]
    assert find_step(curve) == step


def test_a_straight_line_has_the_smallest_step():
    assert find_step([(w, 0.1 + w / 64) for w in WIDTHS]) == STEPS[0]


def test_measured_curves_of_real_backends():
    # ONNX Runtime 1.32 on AVX-512, 3x3 at 16x16, 32 channels on the other side, microseconds
    widths = [4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 56, 64]
    times = [16.0, 19.0, 22.0, 22.8, 42.1, 41.9, 42.0, 42.0, 62.1, 62.4, 62.7, 62.0, 84.0, 84.2]
    assert find_step([(w, t) for w, t in zip(widths, times, strict=True) if w >= 16]) == 16


def test_sweep_measures_every_width_of_every_family():
    opened = []

    def open_chain(width, kernel):
        opened.append((width, kernel))
        return ScriptedRunner(FakeClock(), 0.0)

    class Device:
        def __init__(self, width, kernel):
            step = 16 if kernel == 3 else 8
            self.seconds = 1e-4 + np.ceil(width / step) * step * 1e-6

        def call(self):
            pass

        def block(self, seconds, calls):
            return [self.seconds] * 20

    def open_device(width, kernel):
        open_chain(width, kernel)
        return Device(width, kernel)

    steps = sweep(open_device)
    assert steps.families == {"conv 3x3": 16, "conv 1x1": 8} and steps.measured
    assert steps.candidates == (8, 16)
    assert opened == [(w, k) for k in FAMILIES.values() for w in WIDTHS]
    assert Steps.from_json(json.loads(json.dumps(steps.to_json()))).families == steps.families


def test_chain_is_a_graph_that_runs():
    import onnx
    import onnxruntime

    data = chain(20, 3, batch=2)
    onnx.checker.check_model(onnx.load_model_from_string(data), full_check=True)
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    assert session.run(None, {"images": np.ones((2, 3, 28, 28), np.float32)})[0].shape == (2, 64)


def test_not_attached_comes_from_the_table_and_says_so():
    steps = steps_of(resolve("cpu").with_(attached=False, precision="int8"))
    assert (
        not steps.measured
        and set(steps.families.values()) == {32}
        and from_table("fp16").families == {"conv 3x3": 8, "conv 1x1": 8}
    )


def test_attached_is_measured_once_and_then_cached(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    target = resolve("cpu", backend="onnxruntime")
    steps = steps_of(target)
    assert steps.measured and set(steps.families.values()) <= set(STEPS)
    assert all(min(v for _, v in curve) == 1.0 for curve in steps.curves.values())
    path = cache_path(target)
    assert path.is_relative_to(tmp_path) and json.loads(path.read_text())["measured"]
    # what lies in the cache is what is used
    path.write_text(json.dumps({**steps.to_json(), "families": {"conv 3x3": 64}}))
    assert steps_of(target).families == {"conv 3x3": 64}
    path.write_text("torn")
    assert steps_of(target).families.keys() == FAMILIES.keys()
    assert json.loads(path.read_text())["measured"]
    # and what is to be measured again is
    path.write_text(json.dumps({**steps.to_json(), "families": {"conv 3x3": 64}}))
    assert steps_of(target, "off").families.keys() == FAMILIES.keys()
    assert json.loads(path.read_text())["families"] == {"conv 3x3": 64}
    assert steps_of(target, "refresh").families.keys() == FAMILIES.keys()
    assert json.loads(path.read_text())["families"].keys() == FAMILIES.keys()


def test_the_cache_tells_targets_and_processors_of_one_name_apart(monkeypatch):
    target = resolve("cpu", backend="onnxruntime")
    paths = {cache_path(t) for t in (target, target.with_(threads=2), target.with_(batch=4))}
    monkeypatch.setattr("passdeploy.latency.steps.cpu_stamp", lambda: "another")
    assert len(paths | {cache_path(target)}) == 4
