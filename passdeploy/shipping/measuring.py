"""`passdeploy verify BUNDLE --measure`: the latency on the machine on which a bundle has arrived, and what it means."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from passdeploy import huge_pages
from passdeploy.budget import Budget, parse_budget
from passdeploy.errors import BadInput, Unavailable
from passdeploy.judging import judge
from passdeploy.shipping.contents import Contents, EngineInfo
from passdeploy.shipping.manifest import BundleManifest, EngineEntry
from passdeploy.shipping.sums import Refused

if TYPE_CHECKING:
    from passdeploy.engines.base import Backend, Engine
    from passdeploy.latency.measurement import Comparison
    from passdeploy.targets import Target

_MEASURED = ("unverified", "within_budget", "over_budget")
"""Statuses that a measurement can change; the others are about something else than latency."""


@dataclass(frozen=True)
class Arrival:
    """What was measured on arrival.

    Attributes:
        latency_ms: As in a report.
        speedup: Over the bundle's dense graph, interleaved, with its 95 % interval; None where it was not needed.
        status: What that makes of the bundle.
        message: In one line.
    """

    latency_ms: dict[str, Any]
    speedup: dict[str, Any] | None
    status: str
    message: str


def _entry(engine: EngineInfo, manifest: BundleManifest) -> EngineEntry:
    return next(entry for entry in manifest.engines if entry.id == engine.id)


def target_of(engine: EngineInfo, manifest: BundleManifest) -> Target:
    """The target of an engine that fits this machine, as attached."""
    from passdeploy.shipping.hardware import this_machine
    from passdeploy.targets import Target

    entry = _entry(engine, manifest)
    capability = None
    if entry.requires.compute_capabilities:
        gpus = this_machine().gpus
        capability = gpus[0].compute_capability if gpus else entry.requires.compute_capabilities[0]
    return Target(
        name=entry.target,
        device=entry.device,
        compute_capability=capability,
        backend=entry.backend,
        precision=entry.precision,
        batch=entry.batch,
        threads=entry.threads,
        attached=True,
    )


def sealed_engine(contents: Contents, engine: EngineInfo) -> Engine:
    """An engine of a bundle whose digests were checked."""
    from passdeploy.engines.base import Engine

    data, suffix = contents.sealed.read(engine.file), PurePosixPath(engine.file).suffix
    return Engine(engine.backend, data, suffix, engine.meta)


def measure_arrived(contents: Contents, engine: EngineInfo, manifest: BundleManifest) -> Arrival:
    """Measures an engine here, beside the dense graph when the budget is a speed-up.

    Args:
        contents: The bundle.
        engine: One that fits this machine.
        manifest: The bundle's.

    Raises:
        Refused: The backend can't run the engine here.
    """
    from passdeploy.engines._common import told
    from passdeploy.engines._end_to_end import EndToEnd
    from passdeploy.engines.base import Engine, get_backend
    from passdeploy.latency.measure import BENCH, interleave

    target = target_of(engine, manifest)
    images, _ = contents.samples()
    inputs = {manifest.input.name: np.resize(images, (engine.batch, *images.shape[1:]))}
    budget = _budget(manifest)
    scope = manifest.budget.scope if manifest.budget else "engine"
    try:
        backend = get_backend(engine.backend)
        if reason := backend.runnable(target):
            raise Refused(f"engine {engine.id}: cannot be measured here: {reason}")
        engines: dict[str, Engine] = {}
        missing = ""
        if budget is not None and budget.speedup is not None:
            dense = _dense(contents, manifest, backend, target, images)
            if isinstance(dense, Engine):
                engines["dense"] = dense
            else:
                missing = dense
        engines["engine"] = sealed_engine(contents, engine)
        with ExitStack() as stack, told("the engine"):  # while it is timed, too
            timed: dict[str, Any] = {}
            for name, made in engines.items():
                runner = stack.enter_context(backend.runner(made, target))
                runner.bind(inputs)
                timed[name] = runner if scope == "engine" else EndToEnd(runner, inputs)
            percentiles = (50.0,) if budget is None else (50.0, budget.percent)
            comparison = interleave(timed, replace(BENCH, percentiles=percentiles))
    except (BadInput, Unavailable) as error:
        raise Refused(f"engine {engine.id}: cannot be measured here: {error}") from None
    arrival = arrived(comparison, budget, manifest, missing)
    if _entry(engine, manifest).huge_pages and not huge_pages.used():
        said = f"it was measured with weights in huge pages, here they are not: start with {huge_pages.ASK}"
        return replace(arrival, message=f"{arrival.message}; {said}")
    return arrival


def _dense(
    contents: Contents, manifest: BundleManifest, backend: Backend, target: Target, images: np.ndarray
) -> Engine | str:
    """The dense engine, compiled here; where it can't be, why."""
    from passdeploy.engines.base import CompileInput

    part = manifest.parts.dense_onnx
    if part is None:
        return "the bundle holds no dense graph to compare with"
    # An int8 engine is calibrated on whole batches; that its ranges are those of few images changes no latency.
    images = np.resize(images, (max(len(images), target.batch), *images.shape[1:]))
    with tempfile.TemporaryDirectory(prefix="passdeploy-verify-") as folder:
        path = Path(folder, "dense.onnx")
        path.write_bytes(contents.sealed.read(part.file))
        try:
            return backend.compile(CompileInput(path, samples=images), target)
        except (BadInput, Unavailable) as error:
            return f"the bundle's dense graph is not compiled here: {error}"


def _budget(manifest: BundleManifest) -> Budget | None:
    asked = manifest.budget
    return None if asked is None else parse_budget(asked.asked, asked.percentile, asked.scope)


def arrived(comparison: Comparison, budget: Budget | None, manifest: BundleManifest, missing: str = "") -> Arrival:
    """What a measurement says about the budget.

    Args:
        comparison: Of ``engine``, alone or beside ``dense`` as the reference.
        budget: None: nothing was asked.
        manifest: For the status so far.
        missing: Why there is no ``dense``.
    """
    measurement = comparison.measurements["engine"]
    latency = measurement.to_json()
    told = f"p50 {measurement.p50:.3f} ms" if measurement.p50 is not None else f"mean {measurement.mean:.3f} ms"
    if budget is None or manifest.status not in _MEASURED:
        return Arrival(latency, None, manifest.status, f"{told} on this machine; status stays {manifest.status}")
    if budget.latency_ms is not None:
        value = measurement.at(budget.percent)
        if value is None:
            return Arrival(latency, None, manifest.status, f"{told}: too few samples for {budget.percentile}")
        met = judge(budget, {"thin": latency}) == "within_budget"
        line = f"{budget.percentile} {value:.3f} ms on this machine, {budget.asked} asked"
        return Arrival(latency, None, _status(met), f"{line}: {_status(met)}")
    if "dense" not in comparison.measurements:
        line = f"{told} on this machine; {budget.asked} can't be judged: {missing}"
        return Arrival(latency, None, manifest.status, line)
    ratio = comparison.ratio("engine")
    # Who asks for 1x is given the dense network itself.
    met = judge(budget, {"ratio": ratio.to_json()}, unchanged=budget.speedup == 1) == "within_budget"
    line = f"{told} on this machine, {ratio.value:.2f} times as fast as the dense graph, {budget.asked} asked"
    return Arrival(latency, ratio.to_json(), _status(met), f"{line}: {_status(met)}")


def _status(met: bool) -> str:
    return "within_budget" if met else "over_budget"
