"""Engines whose latency is written down: they move a clock of their own forward, nothing is timed."""

from __future__ import annotations

from collections.abc import Callable


class FakeClock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class ScriptedRunner:
    """`latency(call number, now)` in seconds."""

    def __init__(self, clock: FakeClock, latency: Callable[[int, float], float] | float) -> None:
        self.clock = clock
        self.latency = latency if callable(latency) else lambda i, now: latency
        self.calls = 0

    def call(self) -> None:
        self.clock.now += self.latency(self.calls, self.clock.now)
        self.calls += 1
