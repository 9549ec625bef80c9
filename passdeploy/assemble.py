"""Turns what the stages wrote into a report: verdict, numbers, explanations."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from passdeploy.budget import INTERVAL_SLACK, Budget
from passdeploy.environment import environment
from passdeploy.explain import group_sections, why_not_faster
from passdeploy.layers import by_block
from passdeploy.reporting import schema as s
from passdeploy.reporting.commit import current_commit
from passdeploy.reporting.engines import Alternative, Alternatives, Latency, LayerLatency
from passdeploy.reporting.format import milliseconds
from passdeploy.reporting.picture import prompt_picture, rgb_picture
from passdeploy.stages.alternatives import FACTS as ALTERNATIVES
from passdeploy.stages.common import kept_widths
from passdeploy.stages.finetune import thin_model
from passdeploy.stages.profile import stage_model
from passdeploy.stages.proof import exact, proof_holds
from passdeploy.structure import Structure
from passdeploy.workspace import json_digest, read_json

if TYPE_CHECKING:
    from passdeploy.pipeline import BudgetRun, Run

HOST_BOUND = 0.9
"""Share of the latency from which on enqueueing is as long as what is enqueued."""
DISTURBED = 0.08
"""On a quiet machine fresh processes lie at most half as far apart."""


def judge(budget: Budget, bench: dict[str, Any], unchanged: bool = False) -> str:
    """The verdict on a measured engine (design, section 5, CLI).

    Args:
        budget: What was asked.
        bench: What was measured.
        unchanged: The engine is that of the dense network itself: on which side of 1 its ratio falls is chance, so that
            for 1x the interval alone decides.
    """
    if budget.latency_ms is not None:
        value = bench["thin"][budget.percentile]
        return "within_budget" if value is not None and value <= budget.latency_ms else "over_budget"
    assert budget.speedup is not None
    ratio, low = bench["ratio"]["value"], bench["ratio"]["low"] or 0.0
    fast_enough = ratio >= budget.speedup or (unchanged and budget.speedup == 1)
    return "within_budget" if fast_enough and low >= INTERVAL_SLACK * budget.speedup else "over_budget"


def asked_ms(budget: Budget, dense_ms: float | None) -> float | None:
    """The budget in milliseconds at its percentile; None of a speed-up where that of the dense engine is not known."""
    return budget.latency_ms if dense_ms is None else budget.target_ms(dense_ms)


def _ratio(bench: dict[str, Any]) -> tuple[float, tuple[float, float] | None]:
    """A ratio with its interval; None where an end of it is not known."""
    value, low, high = (bench["ratio"][key] for key in ("value", "low", "high"))
    return value, None if low is None or high is None else (low, high)


def _latency(measurement: dict[str, Any]) -> Latency:
    return Latency(
        **{key: measurement[key] for key in ("p50", "p90", "p99", "mean", "n", "spread")},
        disturbed_blocks=measurement["disturbed"],
        enqueue_ms=measurement.get("enqueue"),
    )


def _curves(search: dict[str, Any], finetune: dict[str, Any] | None) -> s.Curves:
    curves = search["curves"]
    found = tuned = None
    if curves.get("step"):
        series = {
            "loss": curves["loss"],
            "accuracy": curves["accuracy"],
            "latency_ratio": curves["latency_ratio"],
            "kept_blocks": curves["blocks"],
        }
        found = s.Curve(step=curves["step"], series=series)
    if finetune and finetune["curve"]:
        curve = finetune["curve"]
        tuned = s.Curve(step=curve["step"], series={"loss": curve["loss"], "accuracy": curve["accuracy"]})
    return s.Curves(search=found, finetune=tuned)


def _prompt(run: Run, budget: BudgetRun, finetune: dict[str, Any]) -> s.PromptInfo | None:
    stage = thin_model(run, budget).stage
    pixels = stage.pixels()
    if pixels is None:
        return None
    values = pixels.detach()
    example = torch.from_numpy(run.validation_images[:1])
    with torch.no_grad():
        shown = ((stage(example) - stage.shift) / stage.scale)[0].clamp(0, 1)
    return s.PromptInfo(
        kind=stage.kind,  # type: ignore[arg-type]
        width=stage.width,
        size=stage.size,
        png=prompt_picture(values.numpy()),
        example_png=rgb_picture(shown.numpy()),
        largest=float(values.abs().max()),
        accuracy_with=finetune["accuracy"]["validation"],
        accuracy_without=finetune["accuracy_without_prompt"],
    )


def assemble(run: Run, budget: BudgetRun) -> s.Report:
    """Builds the report of one budget from finished stages."""
    space, shared = budget.space, run.space
    dense = read_json(shared.folder("dense") / "dense.json")
    search = read_json(shared.folder("search") / "search.json")
    fit = read_json(space.folder("fit") / "fit.json")
    structure = Structure.load(space.folder("fit") / "structure.json")

    def optional(stage: str, name: str) -> dict[str, Any] | None:
        path = space.folder(stage) / name
        return read_json(path) if space.record(stage) is not None and path.exists() else None

    predictor = stage_model(run)
    notes: list[str] = []
    lower = optional("compile", "accuracy.json")
    finetune, proof, bench = (
        optional("finetune", "finetune.json"),
        optional("compile", "proof.json"),
        optional("bench", "bench.json"),
    )
    judged = finetune["accuracy"]["validation"] if finetune is not None else None
    if lower is not None and finetune is not None:
        # What ships is the engine: in a lower precision its accuracy is not the network's.
        dense["accuracy"]["test"], finetune["accuracy"]["test"] = lower["dense"], lower["model"]
        judged = lower.get("validation")
        where = "on the engines" if lower["of"] == "engine" else "on the graphs that the engines are built from"
        notes.append(f"Accuracies are those in {run.target.precision}, measured {where}.")
    elif run.target.precision != "fp32" and proof is not None:
        notes.append(f"Accuracies are the network's in fp32: nothing in {run.target.precision} can be run here.")
    reached = fit["status"] != "infeasible" and finetune is not None
    measured = bench is not None and bench["measured"]
    equivalent = exact(fit["masked_vs_thin"]) and (proof is None or proof_holds(proof))
    if run.subject.task.name != "classification":
        notes.append(f"Accuracy is the {run.subject.task.metric_name} ({run.subject.task.name}).")
    rebuilds = _rebuilds(optional("compile", "engine/engine.json"))
    notes += build_spread(rebuilds) + disturbance(bench) + host_bound(bench)
    messages = list(fit["messages"]) + notes
    if not equivalent:
        status = "not_equivalent"
        messages.append("A step does not compute the same function as the one before: nothing is shipped.")
    elif fit["status"] == "infeasible":
        status = "infeasible"
    elif not measured:
        status = "unverified"
        why = run.unmeasurable or f"Engines for {run.target.device} could not be run"
        messages.append(f"{why}: nothing was measured, the engine was compiled only.")
    else:
        assert bench is not None
        status = judge(budget.budget, bench, unchanged=fit["status"] == "dense_inside")
    floor = run.config.min_accuracy
    passed = status in ("within_budget", "unverified")
    if passed and floor is not None and judged is not None and judged < floor:
        status = "accuracy_below_floor"
    pruned = None
    macs_speedup = None
    if reached:
        assert finetune is not None
        macs_speedup = dense["macs"] / max(1.0, finetune["macs"])
        pruned = s.NetworkInfo(
            accuracy=finetune["accuracy"]["test"],
            macs=finetune["macs"],
            params=finetune["params"],
            latency_ms=_latency(bench["thin"]) if measured and bench else None,
        )
    ratio: float | None = None
    interval: tuple[float, float] | None = None
    if measured and bench and reached:
        ratio, interval = _ratio(bench)
    dense_ms = bench["dense"][budget.budget.percentile] if measured and bench else predictor.dense_ms
    timing = {name: shared.seconds(name) for name in ("dense", "profile", "search")}
    timing |= {name: space.seconds(name) for name in ("fit", "finetune", "compile", "bench") if space.record(name)}
    alternatives = _alternatives(run, budget, bench)
    if alternatives is not None:
        timing["alternatives"] = shared.seconds("alternatives")
    data = run.subject.data
    config_json = run.config.to_json()
    return s.Report(
        status=status,  # type: ignore[arg-type]
        target=s.TargetInfo(**vars(run.target)),
        budget=s.BudgetInfo(
            asked=budget.budget.asked,
            latency_ms=asked_ms(budget.budget, dense_ms),
            percentile=budget.budget.percentile,
            scope=budget.budget.scope,  # type: ignore[arg-type]
            min_accuracy=floor,
            judged_accuracy=judged if floor is not None else None,
        ),
        method=run.config.method,
        seed=run.config.seed,
        dense=s.NetworkInfo(
            accuracy=dense["accuracy"]["test"],
            macs=dense["macs"],
            params=dense["params"],
            latency_ms=_latency(bench["dense"]) if measured and bench else None,
        ),
        pruned=pruned,
        speedup=s.Speedup(
            latency=ratio,
            latency_ci95=interval,
            macs=macs_speedup,
            realisation=ratio / macs_speedup if ratio and macs_speedup else None,
            processes=bench["processes"] if ratio and bench else None,
        ),
        predictor=s.PredictorInfo(**predictor.summary()),
        equivalence=s.Equivalence(
            masked_vs_thin=fit["masked_vs_thin"],
            thin_vs_onnx=proof["thin_vs_onnx"] if proof else None,
            onnx_vs_engine=proof["onnx_vs_engine"] if proof else None,
            top1_agreement=proof["top1_agreement"] if proof else None,
            tolerance=proof["tolerance"] if proof else None,
            images=proof["images"] if proof else None,
            agreement_images=proof.get("agreement_images") if proof else None,
        ),
        timing_s=timing,
        environment=s.Environment(**environment()),
        groups=group_sections(run, structure),
        frozen=dict(run.subject.groups.frozen) or None,
        distribution=s.Distribution.of(bench["dense"]["samples"], bench["thin"]["samples"])
        if measured and bench
        else None,
        prompt=_prompt(run, budget, finetune) if finetune else None,
        curves=_curves(search, finetune),
        health=[s.HealthCheck(**check) for check in search["health"]] or None,
        candidates=[s.Candidate(**candidate) for candidate in fit["candidates"]] or None,
        why_not_faster=why_not_faster(run, structure, ratio, macs_speedup) if macs_speedup else None,
        messages=messages or None,
        accuracy_points=_points(dense, finetune, bench) + _other_points(alternatives) if reached else None,
        provenance=s.Provenance(
            command=run.command,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            commit=current_commit(),
            model=run.subject.name,
            data=data.name,
            metric=run.subject.task.metric_name,
            config_sha256=json_digest(config_json),
            splits={
                "train": s.Split(images=len(data.train), used_for="search and fine-tuning"),
                "validation": s.Split(images=len(data.val), used_for="every choice, and the proofs"),
                "test": s.Split(images=len(data.test), used_for="the accuracies in this report, nothing else"),
            },
            engine="engine/" + read_json(space.folder("compile") / "engine" / "engine.json")["file"] if proof else None,
            engine_sha256=read_json(space.folder("compile") / "engine" / "engine.json")["sha256"] if proof else None,
        ),
        predicted=None if measured else _predicted(run, structure, reached),
        reachable=s.Reachable(**fit["reachable"]) if fit["reachable"] else None,
        rebuilds=rebuilds,
        alternatives=alternatives,
        layers=_layers(bench),
    )


def _rebuilds(engine: dict[str, Any] | None) -> s.RebuildsInfo | None:
    """What the engine's record tells of its other builds; None before there is one."""
    found = (engine or {}).get("meta", {}).get("rebuilds")
    return None if found is None else s.RebuildsInfo(**found)


def build_spread(rebuilds: s.RebuildsInfo | None) -> list[str]:
    """What a reader should know where another build would have been another engine."""
    if rebuilds is None or rebuilds.of != "builds" or rebuilds.spread is None:
        return []
    return [
        f"{rebuilds.n} builds of the same graph lie {rebuilds.spread:.1%} apart in latency; "
        "the one that was measured is the one that ships."
    ]


def _layers(bench: dict[str, Any] | None) -> list[LayerLatency] | None:
    """By block; None where nothing was measured, or the runtime does not tell."""
    times = (bench or {}).get("layers")
    if times is None:
        return None
    rows = by_block([times["dense"], times["thin"]])
    return [LayerLatency(name=row.name, dense_ms=row.ms[0], pruned_ms=row.ms[1]) for row in rows]


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
    """What a reader should know where fresh processes did not agree."""
    processes = (bench or {}).get("processes") or [1.0]
    apart = max(processes) / min(processes) - 1
    if apart <= DISTURBED:
        return []
    return [
        f"{len(processes)} processes found ratios that lie {apart:.0%} apart: the machine has something else to do, or "
        "others share its caches. What is quoted is their median, with its interval."
    ]


def _alternatives(run: Run, budget: BudgetRun, bench: dict[str, Any] | None) -> Alternatives | None:
    """The dense network in lower precisions: timed beside the engine that ships, or, without one, beside the dense."""
    if not run.wants_alternatives:
        return None
    facts = read_json(run.space.folder("alternatives") / ALTERNATIVES)
    timed = (bench or {}).get("alternatives") or facts["timed"] or {}
    found = []
    for precision, row in facts["precisions"].items():
        option = Alternative(precision=precision, **row)
        times = timed.get(precision)
        if times is not None:
            ratio = times["ratio"]
            option = option.model_copy(
                update={
                    "latency_ms": _latency(times["latency_ms"]),
                    "speedup": ratio["value"],
                    "speedup_ci95": (ratio["low"], ratio["high"]) if ratio["low"] and ratio["high"] else None,
                    "meets_budget": _meets(budget.budget, times),
                }
            )
        found.append(option)
    compiled = budget.space.folder("compile")
    shipped = budget.space.record("compile") is not None and bench is not None
    return Alternatives(
        dense_latency_ms=_latency(timed["dense"]["latency_ms"]) if timed else None,
        dense_bytes=_engine_bytes(compiled / "dense-engine") if shipped else facts["dense_bytes"],
        pruned_bytes=_engine_bytes(compiled / "engine") if shipped else None,
        precisions=found,
    )


def _meets(budget: Budget, times: dict[str, Any]) -> bool | None:
    """`judge` on another engine; None where its percentile could not be told."""
    if budget.latency_ms is not None and times["latency_ms"][budget.percentile] is None:
        return None
    return judge(budget, {"thin": times["latency_ms"], "ratio": times["ratio"]}) == "within_budget"


def _engine_bytes(folder: Path) -> int:
    return (folder / read_json(folder / "engine.json")["file"]).stat().st_size


def _predicted(run: Run, structure: Structure, reached: bool) -> s.Predicted:
    predictor = stage_model(run)
    pruned = float(predictor.predict_many(kept_widths(run, structure)[None].astype(float))[0])
    return s.Predicted(
        dense_ms=predictor.dense_ms,
        pruned_ms=pruned if reached else None,
        speedup=predictor.dense_ms / pruned if reached else None,
    )


def _other_points(alternatives: Alternatives | None) -> list[s.AccuracyPoint]:
    return [
        s.AccuracyPoint(
            label=f"dense {option.precision}",
            kind="alternative",
            accuracy=option.accuracy,
            latency_ms=option.latency_ms.p50 if option.latency_ms else None,
        )
        for option in (alternatives.precisions if alternatives else [])
        if option.reason is None
    ]


def _points(
    dense: dict[str, Any], finetune: dict[str, Any] | None, bench: dict[str, Any] | None
) -> list[s.AccuracyPoint]:
    assert finetune is not None
    timed = bench is not None and bench["measured"]
    dense_ms, thin_ms = (bench[name]["p50"] if timed and bench else None for name in ("dense", "thin"))
    points = [
        s.AccuracyPoint(
            label="dense", kind="dense", accuracy=dense["accuracy"]["test"], latency_ms=dense_ms, macs=dense["macs"]
        ),
        s.AccuracyPoint(
            label="pruned",
            kind="pruned",
            accuracy=finetune["accuracy"]["test"],
            latency_ms=thin_ms,
            macs=finetune["macs"],
        ),
    ]
    if finetune["accuracy_before"] is not None:
        points.insert(
            1,
            s.AccuracyPoint(
                label="before fine-tuning (validation)",
                kind="before_finetune",
                accuracy=finetune["accuracy_before"],
                latency_ms=thin_ms,
                macs=finetune["macs"],
            ),
        )
    return points
