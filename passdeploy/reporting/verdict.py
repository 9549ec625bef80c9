"""What a report says in words: the headline for each status, and every check with its outcome.

Shared by all formats, so that a page, a table in a pull request and a JUnit file never disagree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from passdeploy.budget import INTERVAL_SLACK
from passdeploy.reporting import format as f
from passdeploy.reporting.schema import GroupInfo, NetworkInfo, Report

Tone = Literal["good", "bad", "warn", "neutral"]
EXACT = 1e-4
"""The bound of every step in fp32, whatever the engine's precision (`passdeploy.stages.proof`)."""
_BOUNDS = {"fp32": EXACT}


@dataclass(frozen=True)
class Verdict:
    """The first thing a reader sees.

    Attributes:
        tone: Which colour; the words say the same.
        label: The status in words.
        headline: One sentence.
        detail: One sentence of why, or what to do about it.
    """

    tone: Tone
    label: str
    headline: str
    detail: str


@dataclass(frozen=True)
class Check:
    """Something that was checked; `ok` is None when it could not be. A `warning` fails nothing."""

    name: str
    ok: bool | None
    message: str
    warning: bool = False


def setting(report: Report) -> str:
    """``ONNX Runtime fp32, batch 1, 1 thread``."""
    target = report.target
    parts = [f"{backend_title(target.backend)} {target.precision}", f"batch {target.batch}"]
    if target.compute_capability is None:
        parts.append(f"{target.threads} thread" + ("s" if target.threads != 1 else ""))
    return ", ".join(parts)


def backend_title(name: str) -> str:
    """A backend's own spelling."""
    known = {
        "onnxruntime": "ONNX Runtime",
        "openvino": "OpenVINO",
        "tensorrt": "TensorRT",
        "tensorrt_rtx": "TensorRT-RTX",
        "torch_tensorrt": "Torch-TensorRT",
        "inductor": "TorchInductor",
    }
    return known.get(name, name)


def subject(report: Report) -> str:
    """``resnet20 on Fashion-MNIST``, or the method when the model is not named."""
    provenance = report.provenance
    if provenance is None or provenance.model is None:
        return f"{report.method} run"
    return provenance.model + (f" on {provenance.data}" if provenance.data else "")


def metric(report: Report) -> str:
    """What `accuracy` is, such as ``top-1 accuracy``."""
    return report.provenance.metric if report.provenance else "top-1 accuracy"


def budget_ms(report: Report) -> float | None:
    """The budget as a time; None of a speed-up at another percentile than p50, where no time decides."""
    budget = report.budget
    return None if _is_speedup(report) and budget.percentile != "p50" else budget.latency_ms


def asked(report: Report) -> str:
    """The budget in words: ``2x (291 µs)``, ``250 µs at p99``.

    A speed-up is judged by the medians of blocks, whatever the percentile: it has none, nor a time at another than p50.
    """
    budget, time = report.budget, budget_ms(report)
    as_time = "" if time is None else f.milliseconds(time)
    scope = "" if budget.scope == "engine" else ", end to end"
    if not _is_speedup(report):
        return f"{as_time or budget.asked} at {budget.percentile}{scope}"
    extra = f" ({as_time})" if as_time else ""
    return f"{budget.asked[:-1]}{f.TIMES}{scope}{extra}"


def _is_speedup(report: Report) -> bool:
    return report.budget.asked.lower().endswith("x")


def accuracy_change(report: Report) -> float | None:
    """Pruned minus dense, as a difference of shares; None where one is missing."""
    if report.pruned is None or report.pruned.accuracy is None or report.dense.accuracy is None:
        return None
    return report.pruned.accuracy - report.dense.accuracy


def percentile_ms(report: Report, side: Literal["dense", "pruned"]) -> float | None:
    """The latency at the budget's percentile; None where there is none."""
    network = report.dense if side == "dense" else report.pruned
    if network is None or network.latency_ms is None:
        return None
    value = getattr(network.latency_ms, report.budget.percentile, None)
    return value if isinstance(value, float) else None


def unchanged(report: Report) -> bool:
    """Whether the dense network itself is what is shipped."""
    return report.pruned is not None and report.pruned.macs == report.dense.macs and report.speedup.macs in (1.0, None)


def pace(ratio: float) -> tuple[str, str]:
    """A measured ratio in words: ``2.07×`` and ``faster``, ``1.05×`` and ``slower``."""
    return (f.times(1 / ratio), "slower") if ratio < 0.995 else (f.times(ratio), "faster")


def verdict(report: Report) -> Verdict:
    """The headline of a report."""
    speed = report.speedup
    faster = " ".join(pace(speed.latency)) if speed.latency is not None else "Pruned"
    change = accuracy_change(report)
    cost = f" at {f.points(change)} of {metric(report)}" if change is not None else ""
    budget = asked(report)
    reached = f.milliseconds(percentile_ms(report, "pruned"))
    if report.status == "within_budget":
        if unchanged(report):
            return Verdict(
                "good",
                "within budget",
                "The dense network is already inside the budget",
                f"{reached} against a budget of {budget}: it is shipped as it is.",
            )
        detail = f"{_reached(report)}, measured on the very engine file that ships."
        return Verdict("good", "within budget", f"{faster}{cost}", detail)
    if report.status == "over_budget":
        detail = f"{_reached(report)}, measured. {_why_over(report)}"
        return Verdict("bad", "over budget", f"{faster}{cost}, and still over the budget", detail)
    if report.status == "infeasible":
        return Verdict("bad", "infeasible", f"No structure of this network reaches {budget}", _reachable(report))
    if report.status == "unverified":
        return Verdict("warn", "unverified", _predicted_headline(report), _unmeasured(report))
    if report.status == "not_equivalent":
        failed = [check.name for check in proofs(report) if check.ok is False]
        which = f" ({', '.join(failed)})" if failed else ""
        detail = "A step does not compute the same function as the one before it. Nothing was shipped."
        return Verdict("bad", "not equivalent", f"The proof failed{which}", detail)
    what = "The dense network is inside the budget" if unchanged(report) else faster
    return Verdict("bad", "accuracy below floor", f"{what}, but not accurate enough", _below_floor(report))


def _below_floor(report: Report) -> str:
    """What was held against the floor: accuracy on validation images, which is not the one that the tables show."""
    floor, judged = report.budget.min_accuracy, report.budget.judged_accuracy
    name = f.capital(metric(report))
    is_what = "is below" if judged is None else f"is {f.percent(judged)}, below"
    asked_for = "what was asked for" if floor is None else f"the {f.percent(floor)} that were asked for"
    return f"{name} on validation images {is_what} {asked_for}."


def _why_over(report: Report) -> str:
    """What decided (`passdeploy.judging`): the ratio or time itself, or the lower end of the ratio's interval."""
    if is_fast_enough(report, report.speedup.latency):
        return (
            f"The lower end of the interval has to be {INTERVAL_SLACK:.0%} of what was asked or more: it was measured "
            "too unsteadily to count on it."
        )
    if not _is_speedup(report) and percentile_ms(report, "pruned") is None:
        return "What can't be told is not met."
    if not any(candidate.measured_ratio is not None for candidate in report.candidates or []):
        return "The network was kept as it is, without a closed loop."
    return "The closed loop had measured it inside; the engine file that ships, measured anew, is not."


def is_fast_enough(report: Report, ratio: float | None) -> bool:
    """Whether a ratio by itself is what was asked for: what is not met all the same is not by its interval."""
    return _is_speedup(report) and ratio is not None and ratio >= _factor(report)


def _factor(report: Report) -> float:
    """The speed-up that was asked for."""
    return float(report.budget.asked[:-1])


def _reached(report: Report) -> str:
    """What was measured against what was asked, in the unit in which it was asked and judged."""
    if not _is_speedup(report):
        reached = percentile_ms(report, "pruned")
        if reached is None:
            return f"Too few calls were timed to tell {report.budget.percentile}, against a budget of {asked(report)}"
        return f"{f.beside(reached, budget_ms(report))} against a budget of {asked(report)}"
    speed, interval = report.speedup.latency, report.speedup.latency_ci95
    close = speed is not None and 0 < abs(speed / _factor(report) - 1) < 0.005  # which side of it is to be seen
    ratio = f.times(speed, 3 if close else 2) + (f" (95 %: {f.interval(interval)})" if interval else "")
    return f"{ratio} against {asked(report)}"


def _unmeasured(report: Report) -> str:
    device, backend = report.target.device, backend_title(report.target.backend)
    why = f"{backend} can't run engines for {device} here"
    why = why if report.target.attached else f"{device} is not attached to this machine"
    return f"Nothing was measured: {why}, so no latency is claimed."


def whole(report: Report) -> list[tuple[str, list[str]]]:
    """What could not be pruned: (reason, modules), the reason that most modules have first."""
    reasons: dict[str, list[str]] = {}
    for module, reason in (report.frozen or {}).items():
        reasons.setdefault(reason, []).append(module)
    return sorted(reasons.items(), key=lambda item: -len(item[1]))


def removed_with_block(groups: Sequence[GroupInfo]) -> set[str]:
    """Channel groups that lie wholly in a removed block: whatever their masks say, nothing of them is left."""
    gone = [set(g.members) for g in groups if g.kind == "depth" and not g.kept]
    return {
        g.name for g in groups if g.kind == "channel" and g.members and any(set(g.members) <= branch for branch in gone)
    }


def _reachable(report: Report) -> str:
    best = report.reachable
    if best is None or (best.latency_ms is None and best.speedup is None):
        return "The budget lies below what is left when everything prunable is gone."
    amount = f.beside(best.latency_ms, budget_ms(report)) if best.latency_ms is not None else f.times(best.speedup)
    ratio = f" ({f.times(best.speedup)})" if best.latency_ms is not None and best.speedup is not None else ""
    how = "measured" if best.measured else "predicted, nothing was measured"
    in_time = not _is_speedup(report) and 0 < (best.latency_ms or 0.0) <= (budget_ms(report) or 0.0)
    if best.measured and (in_time or is_fast_enough(report, best.speedup)):
        how += ", but not steadily enough to count on it"
    return f"The fastest that can be reached is {amount}{ratio}, {how}."


def _predicted_headline(report: Report) -> str:
    kind = report.predictor.kind if report.predictor else "analytic"
    source = {"analytic": "by an analytic roofline", "profile": "by a profile measured elsewhere"}.get(kind, "")
    if report.predicted is None or report.predicted.speedup is None:
        return "Built for a target that is not attached"
    return f"Predicted {f.times(report.predicted.speedup)} {source}, not measured".replace("  ", " ")


def tolerance(report: Report) -> float:
    """The bound of the proofs; 1e-4 unless the report says otherwise."""
    given = report.equivalence.tolerance
    return given if given is not None else _BOUNDS.get(report.target.precision, 1e-2)


def proofs(report: Report) -> list[Check]:
    """The steps of the proof, each against its bound; only the engine is in the target's precision."""
    proof, bound = report.equivalence, tolerance(report)
    rows = [
        ("masked = thin", proof.masked_vs_thin, min(bound, EXACT)),
        ("thin = ONNX", proof.thin_vs_onnx, min(bound, EXACT)),
        ("ONNX = engine", proof.onnx_vs_engine, bound),
    ]
    checks = [
        Check(name, None if value is None else value <= limit, _difference(value, limit)) for name, value, limit in rows
    ]
    agreement = proof.top1_agreement
    message = (
        "not checked" if agreement is None else f"{f.percent(agreement)} of predictions are the same (at least 99 %)"
    )
    checks.append(Check("top-1 agreement", None if agreement is None else agreement >= 0.99, message))
    return checks


def _difference(value: float | None, limit: float) -> str:
    return "not checked" if value is None else f"{f.tiny(value)} (at most {limit:.0e})"


def checks(report: Report) -> list[Check]:
    """Everything with an outcome: the budget, the proofs and the search's health."""
    said = verdict(report)
    budget = None if report.status == "unverified" else report.goal_met
    health = [Check(f"health: {item.name}", item.ok, item.message, warning=not item.ok) for item in report.health or []]
    return [Check("verdict", budget, f"{said.label}: {said.headline}. {said.detail}"), *proofs(report), *health]


def numbers(report: Report) -> list[tuple[str, str, str, str]]:
    """The table of both networks: what, dense, pruned, change."""
    dense, pruned, speed = report.dense, report.pruned, report.speedup
    ratio = None if pruned is None or not pruned.params else dense.params / pruned.params
    # Of an infeasible budget what was measured is the fastest there is: no network of this run.
    rows = [] if report.status == "infeasible" else [("latency", "not measured", "not measured", "")]
    if dense.latency_ms is not None:
        rows = [
            (f"latency {q}", _latency(dense, q), _latency(pruned, q), f.times(speed.latency) if q == "p50" else "")
            for q in ("p50", "p90", "p99")
        ]
        if speed.latency_ci95 is not None:
            of = f" of {len(speed.processes)} processes" if speed.processes else ""
            rows.insert(1, (f"95 % interval{of}", "", "", f.interval(speed.latency_ci95)))
    elif report.predicted is not None:
        kind = report.predictor.kind if report.predictor else "analytic"
        guess = report.predicted
        predicted = (f.milliseconds(guess.dense_ms), f.milliseconds(guess.pruned_ms), f.times(guess.speedup))
        model = {"measured": "a model of measured engines", "profile": "a profile measured elsewhere"}.get(kind, kind)
        rows.append((f"predicted latency ({model})", *predicted))
    change = f.points(accuracy_change(report))
    left = pruned.accuracy if pruned else None
    rows += [
        (metric(report), f.percent(dense.accuracy), f.percent(left), change),
        ("MACs", f.count(dense.macs), f.count(pruned.macs if pruned else None), f.times(speed.macs)),
        ("parameters", f.count(dense.params), f.count(pruned.params if pruned else None), f.times(ratio)),
    ]
    if speed.realisation is not None:
        rows.append(("latency / MACs speed-up", "", "", f"{speed.realisation:.2f}"))
    return rows


def _latency(network: NetworkInfo | None, percentile: str) -> str:
    if network is None or network.latency_ms is None:
        return f.NONE
    return f.milliseconds(getattr(network.latency_ms, percentile))
