from __future__ import annotations

import numpy as np
import pytest

from passdeploy.latency.sampler import Sampler, trust
from tests.latency.scripted import FakeClock, ScriptedRunner


def busy(base, share, seed, factor=3.0):
    rng = np.random.default_rng(seed)
    return lambda i, now: base * (rng.uniform(1, factor) if rng.random() < share else 1.0)


def test_the_floor_sees_through_disturbance():
    clock = FakeClock()
    dense = ScriptedRunner(clock, busy(1e-3, 0.7, 0))
    measure = Sampler(dense, clock=clock)
    for k in range(5):
        value = measure(ScriptedRunner(clock, busy(4e-4, 0.7, k)))
        assert value["ratio"] == pytest.approx(0.4, rel=0.005) and value["dense_ms"] > 1.05


def test_more_rounds_while_the_machine_is_slower_than_it_was():
    clock = FakeClock()
    state = {"factor": 1.0}
    dense = ScriptedRunner(clock, lambda i, now: 1e-3 * state["factor"])
    thin = ScriptedRunner(clock, lambda i, now: 5e-4 * state["factor"])
    measure = Sampler(dense, clock=clock, rounds=8, most=20)

    def calls():
        before = dense.calls
        value = measure(thin)
        return dense.calls - before, value

    quiet, first = calls()
    state["factor"] = 1.5
    loud, second = calls()
    assert 1.8 * quiet <= loud <= 2.6 * quiet
    assert second["dense_floor_ms"] == pytest.approx(1.5 * first["dense_floor_ms"])
    assert first["ratio"] == pytest.approx(second["ratio"]) == pytest.approx(0.5)


def test_rounds_end_when_the_time_is_up():
    clock = FakeClock()
    slow = {"now": 1.0}
    dense = ScriptedRunner(clock, lambda i, now: 0.2 * slow["now"])
    measure = Sampler(dense, clock=clock, max_s=4.0, rounds=2)
    slow["now"] = 1.0
    measure(ScriptedRunner(clock, 0.2))
    slow["now"] = 2.0
    start = clock()
    measure(ScriptedRunner(clock, 0.4))
    assert clock() - start < 12


def test_cpu_time_is_used_for_one_thread_only():
    wall, cpu = FakeClock(), FakeClock()

    class Preempted(ScriptedRunner):
        """Takes `base` of CPU time and, as other things run, three to nine times as long."""

        def __init__(self, base, seed):
            rng = np.random.default_rng(seed)
            super().__init__(wall, lambda i, now: base * rng.uniform(3, 9))
            self.base = base

        def call(self):
            super().call()
            cpu.now += self.base

    dense, thin = Preempted(1e-2, 0), Preempted(4e-3, 1)
    exact = Sampler(dense, one_thread=True, clock=wall, cpu_clock=cpu)(thin)
    rough = Sampler(dense, one_thread=False, clock=wall, cpu_clock=cpu)(thin)
    assert exact["ratio"] == pytest.approx(0.4, rel=1e-6)
    assert abs(rough["ratio"] / 0.4 - 1) > 1e-4


def test_what_times_itself_is_asked():
    class Device:
        def __init__(self, seconds):
            self.seconds = seconds

        def call(self):
            raise AssertionError("times itself")

        def block(self, seconds, calls):
            return [self.seconds] * 5

    assert Sampler(Device(2e-3))(Device(1e-3))["ratio"] == pytest.approx(0.5)


def test_real_work():
    data = np.random.default_rng(0).random((64, 64))

    class Work:
        def __init__(self, times):
            self.times = times

        def call(self):
            for _ in range(self.times):
                (data * data).sum()

    value = Sampler(Work(400), one_thread=True)(Work(1))
    assert set(value) == {"ratio", "dense_ms", "thin_ms", "dense_floor_ms"} and 0 < value["ratio"] < 1


def test_one_lucky_sample_does_not_make_the_others_look_disturbed():
    assert trust([1.0] * 9 + [0.8]) == pytest.approx([1.0] * 10)
    assert trust([1.0] * 9 + [1.2]) == pytest.approx([1.0] * 9 + [0.5])
    clock = FakeClock()
    state = {"factor": 0.9}
    dense = ScriptedRunner(clock, lambda i, now: 1e-3 * state["factor"])
    measure = Sampler(dense, clock=clock, rounds=8, most=20)
    counts = []
    for _ in range(5):
        before = dense.calls
        measure(ScriptedRunner(clock, lambda i, now: 5e-4))
        counts.append(dense.calls - before)
        state["factor"] = 1.0
    assert counts[1] > 2 * counts[0], "slower than ever before"
    assert counts[4] < 1.5 * counts[0], "but this is what the machine is like"
