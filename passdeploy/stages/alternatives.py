"""What one would do instead of pruning: the dense network in every lower precision that the backend has.

Computed once for all budgets. Nothing is decided on it; it stands in the report beside what was pruned.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from passdeploy.engines.base import CompileInput, Engine, get_backend
from passdeploy.engines.files import load_engine
from passdeploy.errors import NotWritten, PassdeployError
from passdeploy.export import export_onnx, export_program
from passdeploy.groups.check import first_line
from passdeploy.latency.measure import BENCH, interleave
from passdeploy.stages.accuracy import accuracy_in_precision
from passdeploy.stages.common import plain
from passdeploy.targets import Target
from passdeploy.timing import open_runner
from passdeploy.workspace import read_json, write_json

if TYPE_CHECKING:
    from passdeploy.pipeline import Run

BITS = {"fp32": 32, "fp16": 16, "bf16": 16, "int8": 8, "fp8": 8}
EXPECTED = ("fp16", "int8")
"""What people ask for first: where it is not offered the report says why."""
PAIRS = 20
MOST_S = 4.0
"""For timing all of them together: it says what else could be done, the budget is judged elsewhere."""
FACTS = "alternatives.json"

Compiled = tuple[Engine, Target]
"""An engine, and the target with the engine's own precision."""


def lower_precisions(precision: str) -> list[str]:
    """Those with fewer bits."""
    return [name for name, bits in BITS.items() if bits < BITS[precision]]


def run_alternatives(run: Run, folder: Path) -> None:
    """Compiles the dense network in each lower precision; its accuracy and, on an attached target, its latency."""
    backend = get_backend(run.target.backend)
    source = _dense_source(run, folder)
    rows: dict[str, dict[str, Any]] = {}
    engines: dict[str, Compiled] = {}
    asked = lower_precisions(run.target.precision)
    for done, precision in enumerate(asked):
        run.ui.step(done, len(asked) + 1, f"dense {precision}")
        target = run.target.with_(precision=precision)
        reason = backend.available(target)
        if reason is not None:
            if precision in EXPECTED:
                rows[precision] = {"reason": reason.split("; use --precision")[0]}
            continue
        try:
            engine = backend.compile(source, target)
            accuracy = accuracy_in_precision(run, engine, source, target)
        except NotWritten:
            raise
        except Exception as error:  # whatever a compiler trips over: the run can do without it
            rows[precision] = {"reason": str(error) if isinstance(error, PassdeployError) else first_line(error)}
            continue
        backend.save(engine, folder / precision)
        engines[precision] = engine, target
        rows[precision] = {
            "reason": None,
            "engine_bytes": len(engine.data),
            "accuracy": accuracy.value if accuracy else None,
            "accuracy_of": accuracy.of if accuracy else None,
        }
    run.ui.step(len(asked), len(asked) + 1, "timing")
    timed = dense_bytes = None
    if run.measured and engines:
        dense = backend.compile(source, run.target)
        dense_bytes = len(dense.data)
        timed = unless_it_fails(run, lambda: time_together(run, {"dense": (dense, run.target), **engines}))
    write_json(folder / FACTS, {"precisions": rows, "dense_bytes": dense_bytes, "timed": timed})


def _dense_source(run: Run, folder: Path) -> CompileInput:
    """The dense network's graph; the closed loop's slicer has it already where there is one."""
    images = run.calibration_images
    path = folder / "dense.onnx"
    network = plain(run, run.subject.with_state(run.dense_state()))
    if run.measured:
        path.write_bytes(run.slicer.slice(run.subject.groups.dense()))
    else:
        export_onnx(network, path, run.subject.data.input_shape, run.target.batch)
    wanted = get_backend(run.target.backend).wants_program
    return CompileInput(path, export_program(network, images[: run.target.batch]) if wanted else None, images)


def compiled_alternatives(run: Run) -> dict[str, Compiled]:
    """The engines of a finished stage that can be timed, by precision."""
    if not run.measured or not run.wants_alternatives:
        return {}
    folder = run.space.folder("alternatives")
    rows = read_json(folder / FACTS)["precisions"]
    built = [precision for precision, row in rows.items() if row["reason"] is None]
    return {name: (load_engine(folder / name), run.target.with_(precision=name)) for name in built}


def unless_it_fails(run: Run, take: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    """A measurement that a run can do without: with all engines on one card there may be too little memory for it."""
    try:
        return take()
    except NotWritten:
        raise
    except Exception as error:  # whatever a runtime raises
        why = str(error) if isinstance(error, PassdeployError) else first_line(error)
        run.ui.say(f"the lower precisions are not timed: {why}")
        return None


def time_together(run: Run, engines: Mapping[str, Compiled]) -> dict[str, Any]:
    """Times engines in turns; the first is the reference.

    Returns:
        By name: ``latency_ms``, a `Measurement`, and ``ratio``, how many times as fast as the first; both as JSON.
    """
    settings = dataclasses.replace(
        BENCH, pairs=PAIRS, precise=None, percentiles=(50.0, float(run.config.percentile[1:])), max_s=MOST_S
    )
    images = run.validation_images[: run.target.batch]
    with ExitStack() as stack:
        runners = {
            name: stack.enter_context(open_runner(engine, target, images, run.config.scope))
            for name, (engine, target) in engines.items()
        }
        compared = interleave(runners, settings)
    return {
        name: {"latency_ms": measurement.to_json(), "ratio": compared.ratio(name).to_json()}
        for name, measurement in compared.measurements.items()
    }
