"""The networks that a report sets beside each other: dense, pruned, and what a user would otherwise do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from passdeploy.judging import meets_budget
from passdeploy.reporting import schema as s
from passdeploy.reporting.engines import Alternative, Alternatives, Latency
from passdeploy.stages.alternatives import FACTS as ALTERNATIVES
from passdeploy.workspace import read_json

if TYPE_CHECKING:
    from passdeploy.pipeline import BudgetRun, Run


def latency_of(measurement: dict[str, Any]) -> Latency:
    """A measurement as the report has it."""
    return Latency(
        **{key: measurement[key] for key in ("p50", "p90", "p99", "mean", "n", "spread")},
        disturbed_blocks=measurement["disturbed"],
        enqueue_ms=measurement.get("enqueue"),
    )


def alternatives_beside(run: Run, budget: BudgetRun, bench: dict[str, Any] | None) -> Alternatives | None:
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
                    "latency_ms": latency_of(times["latency_ms"]),
                    "speedup": ratio["value"],
                    "speedup_ci95": (ratio["low"], ratio["high"]) if ratio["low"] and ratio["high"] else None,
                    "meets_budget": meets_budget(budget.budget, times),
                }
            )
        found.append(option)
    compiled = budget.space.folder("compile")
    shipped = budget.space.record("compile") is not None and bench is not None
    return Alternatives(
        dense_latency_ms=latency_of(timed["dense"]["latency_ms"]) if timed else None,
        dense_bytes=_engine_bytes(compiled / "dense-engine") if shipped else facts["dense_bytes"],
        pruned_bytes=_engine_bytes(compiled / "engine") if shipped else None,
        precisions=found,
    )


def _engine_bytes(folder: Path) -> int:
    return (folder / read_json(folder / "engine.json")["file"]).stat().st_size


def alternative_points(alternatives: Alternatives | None, percentile: str) -> list[s.AccuracyPoint]:
    """Accuracy and latency of the dense network in lower precisions; none where one could not be had."""
    return [
        s.AccuracyPoint(
            label=f"dense {option.precision}",
            kind="alternative",
            accuracy=option.accuracy,
            latency_ms=getattr(option.latency_ms, percentile) if option.latency_ms else None,
        )
        for option in (alternatives.precisions if alternatives else [])
        if option.reason is None
    ]


def accuracy_points(
    dense: dict[str, Any], finetune: dict[str, Any] | None, bench: dict[str, Any] | None, percentile: str
) -> list[s.AccuracyPoint]:
    """Accuracy and latency of the dense and of the pruned network, before fine-tuning too where that is known."""
    assert finetune is not None
    timed = bench is not None and bench["measured"]
    dense_ms, thin_ms = (bench[name][percentile] if timed and bench else None for name in ("dense", "thin"))
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
