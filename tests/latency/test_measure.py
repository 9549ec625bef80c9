from __future__ import annotations

import gc
import json

import numpy as np
import pytest

from passdeploy.latency.measure import BENCH, LEAST, Settings, interleave, warm_up
from passdeploy.latency.measurement import Measurement, pooled
from tests.latency.scripted import FakeClock, ScriptedRunner


def measure(runner, settings=BENCH, **clock):
    return interleave({"engine": runner}, settings, **clock).measurements["engine"]


def test_constant_latency_is_read_exactly():
    clock = FakeClock()
    m = measure(ScriptedRunner(clock, 0.001), clock=clock)
    assert m.p50 == pytest.approx(1.0) and m.p90 == pytest.approx(1.0) and m.p99 == pytest.approx(1.0)
    assert m.disturbed == 0 and m.blocks == 40 and not m.noisy
    assert 800 <= m.n <= 40 * 21 and len(m.samples) == m.n


def test_percentiles_are_none_when_samples_are_few():
    clock = FakeClock()
    m = measure(ScriptedRunner(clock, 0.05), Settings(pairs=5), clock=clock)
    assert m.n == 15 and m.p50 == pytest.approx(50.0) and m.p90 is None and m.p99 is None


def test_rounds_are_added_for_a_percentile_that_is_needed():
    clock = FakeClock()
    m = measure(ScriptedRunner(clock, 0.01), Settings(pairs=5, percentiles=(99.0,)), clock=clock)
    assert m.n >= 662 and m.p99 == pytest.approx(10.0)


def test_ratio_survives_drift_and_noise():
    clock, rng = FakeClock(), np.random.default_rng(1)

    def drifting(base):
        return lambda i, now: base * (1 + 0.5 * now) * rng.lognormal(0, 0.02)

    c = interleave(
        {"a": ScriptedRunner(clock, drifting(0.002)), "b": ScriptedRunner(clock, drifting(0.001))}, clock=clock
    )
    ratio = c.ratio("b")
    assert ratio.value == pytest.approx(2.0, rel=0.02) and ratio.low <= 2.0 * 1.02 and ratio.high >= 2.0 * 0.98
    assert c.verdict("b") == "faster" and c.ratio("a").value == 1.0


def test_a_disturbed_block_is_marked_repeated_and_left_out():
    clock = FakeClock()
    # one stretch of 60 ms in which the machine is three times as slow
    slow = ScriptedRunner(clock, lambda i, now: 0.003 if 1.0 < now < 1.06 else 0.001)
    m = measure(slow, Settings(pairs=60), clock=clock)
    assert m.disturbed in (2, 3, 4) and m.blocks == 60 + m.disturbed
    assert m.p99 == pytest.approx(1.0) and m.mean == pytest.approx(1.0, rel=0.01) and not m.noisy


def test_a_machine_that_never_calms_down_is_reported_and_ends():
    clock = FakeClock()
    rng = np.random.default_rng(0)
    state = {"until": 0.0, "factor": 1.0}

    def noisy(i, now):
        if now > state["until"]:
            state["until"], state["factor"] = now + 0.03, rng.choice([1.0, 1.6])
        return 0.001 * state["factor"]

    m = measure(ScriptedRunner(clock, noisy), clock=clock)
    assert m.noisy and m.blocks <= 60


def test_rounds_are_added_until_the_ratio_is_precise():
    def rounds(noise, **changes):
        clock, rng = FakeClock(), np.random.default_rng(0)
        c = interleave(
            {
                "a": ScriptedRunner(clock, lambda i, now: 0.02 * rng.lognormal(0, noise)),
                "b": ScriptedRunner(clock, lambda i, now: 0.01 * rng.lognormal(0, noise)),
            },
            Settings(pairs=20, block_calls=1, retries=0.0, **changes),
            clock=clock,
        )
        ratio = c.ratio("b")
        return c.measurements["a"].blocks, max(ratio.high / ratio.value, ratio.value / ratio.low) - 1

    assert rounds(0.0)[0] == 20
    loud, width = rounds(0.03)
    assert 20 < loud < 80 and width < 0.013
    assert rounds(0.5)[0] == 80  # given up: the interval says how vague it is
    assert rounds(0.5, precise=None)[0] == 20
    assert rounds(0.5, grow=2.0)[0] == 40


def test_slow_engines_end_when_the_time_is_up():
    clock = FakeClock()
    runners = {"a": ScriptedRunner(clock, 2.0), "b": ScriptedRunner(clock, 1.0)}  # 12 s a round
    c = interleave(runners, Settings(pairs=20, max_s=60.0), clock=clock, warm=False)
    assert c.measurements["a"].blocks == LEAST and c.verdict("b") == "faster"
    c = interleave(runners, Settings(pairs=20, max_s=120.0), clock=clock, warm=False)
    assert c.measurements["a"].blocks == 11
    # a percentile that lacks samples is waited for
    c = interleave(runners, Settings(pairs=20, max_s=60.0, percentiles=(90.0,)), clock=clock, warm=False)
    assert c.measurements["a"].n >= 64


def test_a_disturbed_round_takes_no_interval_from_slow_engines():
    """Time allows for eight rounds, and seven have no 99 % interval."""
    clock = FakeClock()
    hiccup = ScriptedRunner(clock, lambda i, now: 4.0 if 24 < now < 36 else 2.0)
    c = interleave({"a": hiccup, "b": ScriptedRunner(clock, 1.0)}, Settings(pairs=20), clock=clock, warm=False)
    assert c.measurements["a"].disturbed >= 1
    assert len(c.pairs["b"]) == LEAST and c.verdict("b") == "faster"
    assert c.ratio("b").low == pytest.approx(2.0) and c.ratio("b").high == pytest.approx(2.0)


def test_engines_that_are_always_disturbed_end_all_the_same():
    clock = FakeClock()
    wild = ScriptedRunner(clock, lambda i, now: 1.0 + (i // 4) % 2)
    c = interleave({"a": wild, "b": ScriptedRunner(clock, 1.0)}, Settings(pairs=20), clock=clock, warm=False)
    assert clock.now < 15 * Settings().max_s and len(c.pairs["b"]) >= LEAST


def test_verdicts():
    clock = FakeClock()

    def versus(factor, noise=0.0, seed=0):
        rng = np.random.default_rng(seed)
        return interleave(
            {
                "a": ScriptedRunner(clock, lambda i, now: 0.001 * rng.lognormal(0, noise)),
                "b": ScriptedRunner(clock, lambda i, now: factor * 0.001 * rng.lognormal(0, noise)),
            },
            clock=clock,
        )

    assert versus(1.0).verdict("b") == "same" and versus(1.015).verdict("b") == "same"
    assert versus(1.08).verdict("b", 0.05) == "slower" and versus(1.08).not_slower("b", 0.05) is False
    assert versus(0.9).verdict("b") == "faster" and versus(0.9).not_slower("b", 0.05) is True
    assert versus(1.05, 0.5).verdict("b", 0.05) == "inconclusive" and versus(1.05, 0.5).not_slower("b", 0.05) is None
    # an engine against itself under heavy noise: no difference is claimed
    claims = sum(versus(1.0, 0.3, seed).verdict("b") in ("slower", "faster") for seed in range(50))
    assert claims <= 1


def test_self_timed_runner_is_asked_for_its_blocks():
    asked = []

    class Device:
        def call(self):
            raise AssertionError("the device times itself")

        def block(self, seconds, calls):
            asked.append((seconds, calls))
            clock.now += seconds
            return [0.002] * 10

    clock = FakeClock()
    assert measure(Device(), clock=clock).p50 == pytest.approx(2.0)
    assert (0.02, 3) in asked


def test_what_the_host_takes_to_enqueue_is_told_beside_the_latency():
    class Device:
        enqueued = ()

        def call(self):
            raise AssertionError("the device times itself")

        def block(self, seconds, calls):
            clock.now += seconds
            self.enqueued = [0.0003, 0.0003, 0.1]
            return [0.002] * 3

    clock = FakeClock()
    comparison = interleave({"gpu": Device(), "cpu": ScriptedRunner(clock, 0.001)}, clock=clock)
    gpu, cpu = comparison.measurements.values()
    assert gpu.p50 == pytest.approx(2.0) and gpu.enqueue == pytest.approx(0.3) and cpu.enqueue is None
    both = pooled([comparison, comparison]).measurements
    assert both["gpu"].enqueue == pytest.approx(0.3) and both["cpu"].enqueue is None
    old = {k: v for k, v in gpu.to_json().items() if k != "enqueue"}  # a log of an earlier version
    assert Measurement.from_json(old).enqueue is None and Measurement.from_json(gpu.to_json()).enqueue == gpu.enqueue


def test_warm_up_waits_until_it_is_steady():
    clock = FakeClock()
    runner = ScriptedRunner(clock, lambda i, now: 0.001 * (1 + 5 * 0.9**i))
    warm_up(runner, clock=clock)
    assert 0.9**runner.calls < 0.05
    runner = ScriptedRunner(clock, lambda i, now: 0.001)
    start = clock()
    warm_up(runner, clock=clock)
    assert clock() - start < 0.1


def test_garbage_collection_is_off_while_timing_and_on_after():
    seen = []

    def latency(i, now):
        seen.append(gc.isenabled())
        if i == 500:
            raise RuntimeError("engine died")
        return 0.001

    clock = FakeClock()
    with pytest.raises(RuntimeError):
        measure(ScriptedRunner(clock, latency), clock=clock)
    assert not any(seen) and gc.isenabled()


def test_samples_are_thinned_and_json_round_trips():
    clock = FakeClock()
    m = measure(ScriptedRunner(clock, lambda i, now: 1e-4 + 1e-8 * (i % 7)), Settings(pairs=60), clock=clock)
    assert m.n > 10000 and 1000 <= len(m.samples) <= 2000
    back = Measurement.from_json(json.loads(json.dumps(m.to_json(samples=True))))
    assert back.p99 == m.p99 and len(back.samples) == len(m.samples)
    assert Measurement.from_json(m.to_json()).samples == ()
    assert m.at(50) == m.p50 and m.at(75) == pytest.approx(m.p50, rel=0.01)


def test_real_work_is_measured_with_the_real_clock():
    data = np.random.default_rng(0).random((96, 96), dtype=np.float32)

    class Work:
        def __init__(self, times):
            self.times = times

        def call(self):
            for _ in range(self.times):
                (data * data).sum()

    c = interleave({"one": Work(1), "many": Work(400)}, Settings(pairs=12, block_s=0.002, warmup_s=0.002))
    assert c.ratio("many").value < 1 and c.verdict("many") in ("slower", "inconclusive")
    assert c.measurements["one"].n >= 36 and c.measurements["one"].floor <= c.measurements["one"].p50
