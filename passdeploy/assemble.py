"""Turns what the stages wrote into a report: verdict, numbers, explanations."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import torch

from passdeploy.compared import accuracy_points, alternative_points, alternatives_beside, latency_of
from passdeploy.dependencies import BUDGET_STAGES, skipped
from passdeploy.environment import environment
from passdeploy.explain import group_sections, why_not_faster
from passdeploy.judging import asked_ms, judge, ratio_of
from passdeploy.layers import by_block
from passdeploy.remarks import build_spread, disturbance, host_bound, other_pace, small_pages, untrained
from passdeploy.reporting import schema as s
from passdeploy.reporting.commit import current_commit
from passdeploy.reporting.engines import LayerLatency
from passdeploy.reporting.picture import prompt_picture, rgb_picture
from passdeploy.stages.common import kept_widths
from passdeploy.stages.finetune import thin_model
from passdeploy.stages.profile import stage_model
from passdeploy.stages.proof import exact, proof_holds
from passdeploy.structure import Structure
from passdeploy.workspace import json_digest, read_json

if TYPE_CHECKING:
    from passdeploy.pipeline import BudgetRun, Run


def _curves(search: dict[str, Any], finetune: dict[str, Any] | None, index: int) -> s.Curves:
    """Of one budget: a search of several takes turns, under masks of different sizes."""
    curves = search["curves"]
    found = tuned = None
    steps = curves.get("step", [])
    # Searches of earlier versions do not say whose turn a point was of.
    own = [i for i, budget in enumerate(curves.get("budget", [index] * len(steps))) if budget == index]
    if own:
        shown = {"loss": "loss", "accuracy": "accuracy", "latency_ratio": "latency_ratio", "blocks": "kept_blocks"}
        series = {name: [curves[key][i] for i in own] for key, name in shown.items()}
        found = s.Curve(step=[steps[i] for i in own], series=series)
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

    # What is left out now may lie there from before: of a structure that is not this one's.
    left_out = skipped(budget)
    made = {name for name in BUDGET_STAGES if name not in left_out and space.record(name) is not None}

    def optional(stage: str, name: str) -> dict[str, Any] | None:
        path = space.folder(stage) / name
        return read_json(path) if stage in made and path.exists() else None

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
        where = "on the engines"
        if lower["of"] == "graph":
            precision = run.target.precision
            rounded = precision if precision == "fp16" else f"{precision} where it quantises, and to fp16 elsewhere"
            where = (
                f"on the graphs that the engines are built from, with weights rounded to {rounded}; "
                "sums are computed in fp32 here"
            )
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
    if measured and run.target.compute_capability is None:
        notes += small_pages(dense["params"])
    if measured and bench:
        notes += other_pace(fit.get("pace_ms"), bench["dense"]["p50"], len(bench.get("attempts", [None])))
    messages = untrained(run.subject, dense["accuracy"]["validation"]) + list(fit["messages"]) + notes
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
            latency_ms=latency_of(bench["thin"]) if measured and bench else None,
        )
    ratio: float | None = None
    interval: tuple[float, float] | None = None
    if measured and bench and reached:
        ratio, interval = ratio_of(bench)
    percentile = budget.budget.percentile
    measured_ms = bench["thin"]["p50"] if measured and bench else None
    dense_ms = bench["dense"][percentile] if measured and bench else fit.get("dense_ms") or predictor.dense_ms
    timing = {name: shared.seconds(name) for name in ("dense", "profile", "search")}
    timing |= {name: space.seconds(name) for name in ("fit", "finetune", "compile", "bench") if name in made}
    alternatives = alternatives_beside(run, budget, bench)
    if alternatives is not None:
        timing["alternatives"] = shared.seconds("alternatives")
    points = None
    if reached:
        points = [
            *accuracy_points(dense, finetune, bench, percentile),
            *alternative_points(alternatives, percentile),
        ]
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
            latency_ms=latency_of(bench["dense"]) if measured and bench else None,
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
        curves=_curves(search, finetune, budget.index),
        health=[s.HealthCheck(**check) for check in search["health"]] or None,
        candidates=[s.Candidate(**candidate) for candidate in fit["candidates"]] or None,
        why_not_faster=why_not_faster(run, structure, ratio, macs_speedup, measured_ms) if macs_speedup else None,
        messages=messages or None,
        accuracy_points=points,
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


def _layers(bench: dict[str, Any] | None) -> list[LayerLatency] | None:
    """By block; None where nothing was measured, or the runtime does not tell."""
    times = (bench or {}).get("layers")
    if times is None:
        return None
    rows = by_block([times["dense"], times["thin"]])
    return [LayerLatency(name=row.name, dense_ms=row.ms[0], pruned_ms=row.ms[1]) for row in rows]


def _predicted(run: Run, structure: Structure, reached: bool) -> s.Predicted:
    predictor = stage_model(run)
    pruned = float(predictor.predict_many(kept_widths(run, structure)[None].astype(float))[0])
    return s.Predicted(
        dense_ms=predictor.dense_ms,
        pruned_ms=pruned if reached else None,
        speedup=predictor.dense_ms / pruned if reached else None,
    )
