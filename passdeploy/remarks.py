"""What a reader of a report should know about its measurements."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from passdeploy import huge_pages
from passdeploy.latency.measurement import Measurement
from passdeploy.reporting import schema as s
from passdeploy.reporting.format import milliseconds

if TYPE_CHECKING:
    from passdeploy.subject import Subject

OTHER_PACE = 0.15
"""A dense engine that is so much slower or faster than in the closed loop: another machine, in effect."""
HOST_BOUND = 0.9
"""Share of the latency from which on enqueueing is as long as what is enqueued."""
DISTURBED = 0.08
"""On a quiet machine fresh processes lie at most half as far apart."""
LARGE = 8e6
"""Bytes of weights that a core's own cache does not hold: the largest such caches have 2 to 4 MB."""
GUESSING = 2.0
"""Times the accuracy of guessing that a trained network is better than."""


def untrained(subject: Subject, accuracy: float | None) -> list[str]:
    """What a reader should know where a network that was given with its weights does little better than guess.

    Args:
        subject: Of the run.
        accuracy: Of the dense network on the validation images, if that is known.
    """
    classes = subject.data.num_classes
    if subject.weights is None or subject.task.name != "classification" or classes <= 3 or accuracy is None:
        return []
    if accuracy >= GUESSING / classes:
        return []
    return [
        f"The dense network with the weights that were given ({subject.weights}) is right on {accuracy:.1%} of the "
        f"validation images, and guessing on {1 / classes:.1%}: check mean and std, the order of the classes, and that "
        "the weights are for these data."
    ]


def build_spread(rebuilds: s.RebuildsInfo | None) -> list[str]:
    """What a reader should know where another build would have been another engine."""
    if rebuilds is None or rebuilds.of != "builds" or rebuilds.spread is None:
        return []
    return [
        f"{rebuilds.n} builds of the same graph lie {rebuilds.spread:.1%} apart in latency; "
        "the one that was measured is the one that ships."
    ]


def host_bound(bench: dict[str, Any] | None) -> list[str]:
    """What a reader should know where the host, not the GPU, sets the pace of the engine that ships."""
    thin = (bench or {}).get("thin", {})
    host, device = thin.get("enqueue"), thin.get("p50")
    if host is None or device is None or host < HOST_BOUND * device:
        return []
    return [
        f"The host takes {milliseconds(host)} to enqueue an inference that takes the GPU {milliseconds(device)}: a "
        "server that asks for one after the other waits for the host; thinner layers will not help, larger batches may."
    ]


def disturbance(bench: dict[str, Any] | None) -> list[str]:
    """What a reader should know where fresh processes did not agree, or the blocks in them."""
    bench, notes = bench or {}, []
    processes = bench.get("processes") or [1.0]
    apart = max(processes) / min(processes) - 1
    if apart > DISTURBED:
        notes.append(
            f"{len(processes)} processes found ratios that lie {apart:.0%} apart: the machine has something else to "
            "do, or others share its caches. What is quoted is their median, with its interval."
        )
    for name, engine in (("dense", "dense"), ("thin", "pruned")):
        if name in bench and (timed := Measurement.from_json(bench[name])).noisy:
            notes.append(
                f"The machine was disturbed while the {engine} engine was timed: {timed.disturbed} of {timed.blocks} "
                f"blocks stood out and were left out, and blocks differ by {timed.spread:.1%} (standard deviation)."
            )
    return notes


def small_pages(params: int) -> list[str]:
    """What a reader should know where a CPU could be faster by a setting of the system's.

    Args:
        params: Of the dense network, which is what its engine reads each time.
    """
    advice = huge_pages.advice()
    if advice is None or 4 * params < LARGE:
        return []
    return [
        f"The weights ({4e-6 * params:.0f} MB in fp32) lie in small pages. In huge pages networks that do not fit a "
        f"cache are faster, dense and pruned, and measurements repeat better: {advice}, here and where the engine is "
        "served."
    ]


def other_pace(then_ms: float | None, now_ms: float | None, attempts: int = 1) -> list[str]:
    """What a reader should know where the dense engine was not as fast in the closed loop as in the last measurement.

    Args:
        then_ms: The dense engine's latency in the closed loop; None: not measured there.
        now_ms: In the measurement that decides.
        attempts: How many were made; the one with the fastest dense engine decides.
    """
    if not then_ms or not now_ms or max(then_ms, now_ms) / min(then_ms, now_ms) - 1 < OTHER_PACE:
        return []
    least = f", the least disturbed of {attempts}," if attempts > 1 else ""
    return [
        f"The dense engine takes {milliseconds(now_ms)} in the measurement that decides{least} and took "
        f"{milliseconds(then_ms)} when the budget was fitted: the machine is not as it was, and ratios move with it. "
        "On a quiet one, passdeploy verify --measure of the run's bundle measures again."
    ]
