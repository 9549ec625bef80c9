"""The engine file that ships, timed against the dense engine."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from passdeploy.engines.files import load_engine
from passdeploy.errors import NotWritten, PassdeployError
from passdeploy.groups.check import first_line
from passdeploy.latency.log import MeasurementLog, write_csv
from passdeploy.latency.measurement import Comparison, pooled
from passdeploy.remarks import OTHER_PACE
from passdeploy.reporting.format import milliseconds
from passdeploy.stages.alternatives import compiled_alternatives, time_together, unless_it_fails
from passdeploy.stages.common import bench_settings, fitted_structure
from passdeploy.timing import compare_files, open_runner
from passdeploy.workspace import read_json, write_json

if TYPE_CHECKING:
    from passdeploy.budget import Budget
    from passdeploy.pipeline import BudgetRun, Run

PROCESSES = 6
"""Where a process puts its buffers moves the ratio by up to 1 % either way; six are the fewest whose median has a 95 %
interval without an assumption about their distribution: from the lowest to the highest."""
MOST_PROCESSES = 18
PRECISE = 0.02
"""Where the interval reaches further than this to either side, the machine is disturbed: more processes are asked."""
AGAIN = 2
"""Further measurements, at most, while the dense engine is slower than when the budget was fitted."""
PAUSE_S = 20.0
"""Before each of them: what disturbs a machine takes a while to pass."""
LAYER_ROUNDS = 3
"""The engines take turns at being watched, so that a disturbance does not pass for a difference between them."""


def run_bench(run: Run, budget: BudgetRun, folder: Path) -> None:
    """Times the very engine file that ships against the dense engine, interleaved, in fresh processes."""
    if not run.measured:
        write_json(folder / "bench.json", {"measured": False})
        return
    compiled = budget.space.folder("compile")
    folders = {"dense": compiled / "dense-engine", "thin": compiled / "engine"}
    log = MeasurementLog(folder / "measurements.jsonl")
    digest = fitted_structure(budget.space.folder("fit")).digest()

    def measure() -> Comparison:
        return in_processes(
            run, budget.budget, folders, lambda take: log.measure("process", digest, run.target.name, take).value
        )

    fitted_ms, known = read_json(budget.space.folder("fit") / "fit.json").get("pace_ms"), 0

    def again(now_ms: float) -> None:
        nonlocal known
        if log.measured > known:  # else the log had it, and nothing is to be waited for
            run.ui.say(
                f"the dense engine takes {milliseconds(now_ms)}, and took {milliseconds(fitted_ms)} when the budget "
                "was fitted: something else is running here. Measuring again"
            )
            time.sleep(PAUSE_S)
        known = log.measured

    attempts = until_undisturbed(measure, fitted_ms, again)
    together = min(attempts, key=lambda each: pace(each) or float("inf"))
    beside = None
    if lower := compiled_alternatives(run):
        both = {name: (load_engine(path), run.target) for name, path in folders.items()}

        def take() -> dict[str, Any]:
            return {"times": unless_it_fails(run, lambda: time_together(run, {**both, **lower}))}

        value = log.measure("alternatives", digest, run.target.name, take).value
        beside = value.get("times", value)  # itself, as earlier versions logged it
    layers = log.measure("layers", digest, run.target.name, lambda: {"ms": _layer_times(run, folders)}).value["ms"]
    write_json(
        folder / "bench.json",
        {
            "measured": True,
            "processes": list(together.pairs["thin"]),
            "ratio": together.ratio("thin").to_json(),
            "attempts": [{"dense_ms": pace(each), "ratio": each.ratio("thin").value} for each in attempts],
            **{name: m.to_json(samples=True) for name, m in together.measurements.items()},
            "alternatives": beside,
            "layers": layers,
        },
    )
    logs = [run.space.folder("profile"), run.space.folder("search"), budget.space.folder("fit"), folder]
    everything = chain.from_iterable(MeasurementLog(f / "measurements.jsonl").records for f in logs)
    write_csv(everything, folder / "measurements.csv")


def pace(found: Comparison) -> float | None:
    """The dense engine's median, whatever the budget's percentile: a tail says little of a machine."""
    return found.measurements["dense"].p50


def until_undisturbed(
    measure: Callable[[], Comparison], fitted_ms: float | None, again: Callable[[float], None]
) -> list[Comparison]:
    """Measures, and again while the dense engine is so much slower than it was that this is another machine, in effect.

    What the thin engine does has no say in it. The measurement with the fastest dense engine is the least disturbed
    one, and counts.

    Args:
        measure: Engines ``dense`` and ``thin``.
        fitted_ms: The dense engine's `pace` when the budget was fitted; None: not measured then.
        again: Called before the next one, with what the pace is.

    Returns:
        All that were made.
    """
    found = [measure()]
    while fitted_ms and len(found) <= AGAIN:
        now = pace(found[-1])
        if now is None or now / fitted_ms - 1 < OTHER_PACE:
            break
        again(now)
        found.append(measure())
    return found


def in_processes(
    run: Run,
    budget: Budget,
    folders: Mapping[str, Path],
    keep: Callable[[Callable[[], dict[str, Any]]], dict[str, Any]] = lambda take: take(),
) -> Comparison:
    """The saved engines ``dense`` and ``thin`` beside each other, in as many fresh processes as their ratio takes.

    Args:
        run: For its target and images.
        budget: What they are to be judged by.
        folders: Of the engines, by name.
        keep: Takes a process's measurement, or has it from before.
    """
    settings = dataclasses.replace(bench_settings(budget), precise=None, processes=PROCESSES)
    images = run.validation_images[: run.target.batch]

    def take() -> dict[str, Any]:
        return compare_files(folders, run.target, images, run.config.scope, settings).to_json()

    found: list[Comparison] = []
    together = None
    while together is None or (len(found) < MOST_PROCESSES and together.ratio("thin").reach > PRECISE):
        run.ui.step(len(found), max(PROCESSES, len(found) + 1))
        found.append(Comparison.from_json(keep(take)))
        together = pooled(found) if len(found) >= PROCESSES else None
    return together


def _layer_times(run: Run, folders: dict[str, Path]) -> dict[str, dict[str, float]] | None:
    """Milliseconds of each layer of each engine, undisturbed ones; None where the runtime does not tell.

    Nor where it fails: being watched takes memory of its own, and hours of measuring are not lost for an extra.
    """
    try:
        return _watched(run, folders)
    except NotWritten:
        raise
    except Exception as error:  # whatever a runtime raises
        why = str(error) if isinstance(error, PassdeployError) else first_line(error)
        run.ui.say(f"the layers are not timed: {why}")
        return None


def _watched(run: Run, folders: dict[str, Path]) -> dict[str, dict[str, float]] | None:
    found: dict[str, dict[str, float]] = {}
    images = run.validation_images[: run.target.batch]
    with ExitStack() as stack:
        runners = {
            name: stack.enter_context(open_runner(load_engine(path), run.target, images))
            for name, path in folders.items()
        }
        for _ in range(LAYER_ROUNDS):
            for name, runner in runners.items():
                times = runner.layer_times()
                if times is None:
                    return None
                least = found.get(name, times)
                found[name] = {layer: min(ms, least.get(layer, ms)) for layer, ms in times.items()}
    return found
