"""The latency model of the target: fitted on measured engines, read from a file, or the analytic roofline."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import passdeploy
from passdeploy import huge_pages
from passdeploy.errors import BadInput
from passdeploy.latency.cache import ProfileCache
from passdeploy.latency.log import MeasurementLog
from passdeploy.latency.macs import SCHEMA as MACS
from passdeploy.latency.macs import MacsModel
from passdeploy.latency.model import LatencyModel
from passdeploy.latency.profile import profile
from passdeploy.latency.roofline import Roofline
from passdeploy.latency.steps import Steps, steps_of
from passdeploy.stages.common import meter
from passdeploy.targets import ANY_GPU, cpu_stamp
from passdeploy.workspace import read_json, write_json

if TYPE_CHECKING:
    from passdeploy.pipeline import Run

MEASUREMENTS = "measurements.jsonl"
ROOFLINE = "passdeploy.roofline/1"
Predictor: TypeAlias = LatencyModel | Roofline | MacsModel


def stage_model(run: Run) -> Predictor:
    """The latency model of a finished profile stage."""
    facts = read_json(run.space.folder("profile") / "profile.json")
    if facts["schema"] == ROOFLINE:
        return roofline(run)
    if facts["schema"] == MACS:
        return MacsModel(run.subject.operators, list(run.subject.groups.units.values()))
    kind = "measured" if run.config.profile_file is None else "profile"
    return LatencyModel.from_json(facts, run.subject.operators, list(run.subject.groups.units.values()), kind)


def roofline(run: Run) -> Roofline:
    """The analytic model of a target that nothing can be measured on."""
    return Roofline(run.subject.operators, list(run.subject.groups.units.values()), run.target)


def run_profile(run: Run, folder: Path) -> None:
    """Fits the latency model: on measured engines, from a file, or, where nothing can be measured, the roofline."""
    config, subject = run.config, run.subject
    units = list(subject.groups.units.values())
    if config.axis == "macs":
        write_json(folder / "profile.json", {"schema": MACS})
    elif config.profile_file is not None:
        model = given_model(run)
        _say_differences(run, model.provenance)
        write_json(folder / "profile.json", model.to_json())
    elif run.measured:
        # The seed is left out: any sample of structures will do.
        asked = config.profile.model_dump(exclude={"cache"})
        cache = ProfileCache(
            subject.operators,
            units,
            {
                "network": subject.architecture,
                "target": run.target_facts(),
                "cpu": cpu_stamp(),
                "passdeploy": passdeploy.__version__,  # its export decides what is timed
                "scope": config.scope,
                "profile": asked,
            },
        )
        known = cache.load() if config.profile.cache == "use" else None
        if known is not None:
            date = known.provenance.get("date", "another day")
            run.ui.say(f"Latency model: from this machine's cache, measured on {date}.")
            (folder / MEASUREMENTS).unlink(missing_ok=True)  # of an interrupted call: no part of this model
        else:
            known = _measured_profile(run, folder)
            if config.profile.cache != "off":
                cache.store(known)
        if failed := known.provenance.get("failed", 0):
            tried = failed + len(known.ratios) - 1
            run.ui.say(f"Latency model: fitted without {failed} of {tried} structures, which can't be measured.")
        write_json(folder / "profile.json", known.to_json())
    else:
        roofline(run)  # refuses a GPU of which no data sheet is known
        write_json(folder / "profile.json", {"schema": ROOFLINE, "target": run.target.name})


def given_model(run: Run) -> LatencyModel:
    """The latency model that was measured elsewhere.

    Raises:
        BadInput: The file is none, or of another network, other hardware or other settings than the run's.
    """
    assert run.config.profile_file is not None
    units = list(run.subject.groups.units.values())
    model = LatencyModel.load(Path(run.config.profile_file), run.subject.operators, units)
    _refuse_other(run, model.provenance)
    return model


def _refuse_other(run: Run, measured: dict[str, Any]) -> None:
    """Refuses a latency model of other hardware or settings than the run's."""
    mine = run.target_facts() | {"scope": run.config.scope}
    settings = ["name", "precision", "batch", "scope"]
    settings += ["threads"] if run.target.compute_capability is None else []
    settings += ["device"] if run.target.name == ANY_GPU else []  # a name that any may have says nothing
    for key in settings:
        if key in measured and measured[key] != mine[key]:
            raise BadInput(
                f"--profile {run.config.profile_file}: measured for {_as_flag(key)} {measured[key]}, this run is for "
                f"{mine[key]}; measure one with passdeploy profile --save"
            )


def _say_differences(run: Run, measured: dict[str, Any]) -> None:
    """Says where a latency model is of another machine of the kind, another version or other code."""
    mine = run.target_facts()
    # A target that is not attached is called by the catalogue's name, not by its device's own.
    words = {"device": "on"} if run.target.attached else {}
    words |= {"backend": "with", "backend_version": "with version"}
    then = "the closed loop corrects it" if run.measured else "nothing is measured here that would correct it"
    for key, what in words.items():
        if key in measured and measured[key] != mine[key]:
            run.ui.say(f"Latency model: measured {what} {measured[key]}, not {mine[key]}; {then}.")
    huge = measured.get("huge_pages")
    if run.target.attached and huge is not None and huge != huge_pages.used():
        was, now = ("huge", "small") if huge else ("small", "huge")
        run.ui.say(f"Latency model: measured with weights in {was} pages, and here they lie in {now} ones; {then}.")
    if measured.get("network", run.subject.architecture) != run.subject.architecture:
        run.ui.say(
            "Latency model: measured on a network of the same shapes whose code, activations or normalisations differ."
        )


def _as_flag(key: str) -> str:
    return {"name": "--target", "scope": "scope", "device": "GPU"}.get(key, f"--{key}")


def _measured_profile(run: Run, folder: Path) -> LatencyModel:
    """Fits the latency model to engines of varied structures, measured on the target."""
    config, subject = run.config, run.subject
    with meter(run) as timed:
        if timed.slicer.reason:
            run.ui.say(f"Structures are exported one by one ({timed.slicer.reason}).")
        kept = folder / "steps.json"  # of an interrupted call, whose measurements are continued as well
        if kept.exists():
            steps = Steps.from_json(read_json(kept))
        else:
            steps = steps_of(run.target, config.profile.cache)
            write_json(kept, steps.to_json())
        today = time.strftime("%Y-%m-%d", time.gmtime())
        return profile(
            timed.sample,
            subject.operators,
            subject.groups,
            budget_s=config.profile.seconds,
            seed=config.seed,
            log=MeasurementLog(folder / MEASUREMENTS),
            target_key=run.target.name,
            steps=steps.candidates,
            most=config.profile.structures,
            bytes_per_weight={"fp32": 4, "int8": 1, "fp8": 1}.get(run.target.precision, 2),
            provenance={
                **run.target_facts(),
                "scope": config.scope,
                "huge_pages": huge_pages.used() if run.target.compute_capability is None else None,
                "model": subject.name,
                "network": subject.architecture,
                "date": today,
            },
            progress=lambda share: run.ui.step(round(100 * share), 100),
        )
