"""What else could be done: the dense network in lower precisions beside the pruned one, in words and as a table."""

from __future__ import annotations

from passdeploy.reporting import format as f
from passdeploy.reporting import verdict as v
from passdeploy.reporting.engines import Alternative, Latency
from passdeploy.reporting.schema import Report

HEAD = ("engine", "speed-up", "95 %", "latency", "accuracy", "change", "engine size", "in budget")
MINOR = ("95 %", "latency", "change", "engine size")
"""Columns that a narrow screen does without."""
_IN_BUDGET = {True: "yes", False: "no", None: f.NONE}
_TOO_INACCURATE = "yes, too inaccurate"


def built(report: Report) -> list[Alternative]:
    """The precisions that there is an engine of."""
    return [option for option in report.alternatives.precisions if option.reason is None] if report.alternatives else []


def rows(report: Report) -> list[tuple[str, ...]]:
    """A row (as `HEAD`) for the dense engine, the pruned one and each lower precision; empty without any of these."""
    options, found = built(report), report.alternatives
    if found is None or not options:
        return []
    dense, pruned, ratio = report.dense, report.pruned, report.speedup
    beside = dense.latency_ms or found.dense_latency_ms
    result: list[tuple[str, ...]] = [
        (
            f"dense {report.target.precision}",
            f.times(1.0) if beside else f.NONE,
            "",
            f.milliseconds(_at(report, beside)),
            f.percent(dense.accuracy),
            "",
            f.size(found.dense_bytes),
            "",
        )
    ]
    if pruned is not None:
        inside = {"within_budget": True, "over_budget": False}.get(report.status)
        result.append(
            (
                f"pruned {report.target.precision}",
                f.times(ratio.latency),
                f.interval(ratio.latency_ci95),
                f.milliseconds(v.percentile_ms(report, "pruned")),
                f.percent(pruned.accuracy),
                f.points(v.accuracy_change(report)),
                f.size(found.pruned_bytes),
                _IN_BUDGET[inside],
            )
        )
    return result + [
        (
            _name(option),
            f.times(option.speedup),
            f.interval(option.speedup_ci95),
            f.milliseconds(_at(report, option.latency_ms)),
            f.percent(option.accuracy),
            f.points(_change(report, option)),
            f.size(option.engine_bytes),
            _TOO_INACCURATE
            if option.meets_budget and _accurate(report, option) is False
            else _IN_BUDGET[option.meets_budget],
        )
        for option in options
    ]


def missing(report: Report) -> list[tuple[str, str]]:
    """Precisions without an engine: name, why."""
    options = report.alternatives.precisions if report.alternatives else []
    return [(f"dense {option.precision}", option.reason) for option in options if option.reason is not None]


def session(report: Report) -> str:
    """Where latencies and speed-ups of the lower precisions do not divide into each other, why; else empty."""
    then = _at(report, report.alternatives.dense_latency_ms) if report.alternatives else None
    if then is None or report.dense.latency_ms is None or all(option.latency_ms is None for option in built(report)):
        return ""
    return (
        "The lower precisions were timed in turns with the dense engine in a session of their own, where that took "
        f"{f.milliseconds(then)}: their speed-ups are over this."
    )


def said(report: Report) -> str:
    """Which of them meets the budget, in a sentence or two."""
    options = built(report)
    if not options:
        return "There is no lower precision of the dense network to compare with here."
    budget = v.asked(report)
    if all(option.meets_budget is None for option in options):
        why = "Nothing was measured"
        if any(option.latency_ms is not None for option in options):
            why = f"Too few calls were timed to tell {report.budget.percentile}"
        return f"{why}, so whether one of them meets the budget of {budget} is not known."
    inside = [option for option in options if option.meets_budget]
    meeting = [option for option in inside if _accurate(report, option)]
    if meeting:
        as_well = " as well" if report.status == "within_budget" else ""
        return f"{_meet(report, meeting)} the budget of {budget}{as_well}, without pruning."
    if inside:
        floor = f.percent(report.budget.min_accuracy)
        known = any(option.accuracy is not None for option in inside)
        why = f"not the {floor} that were asked for" if known else f"nobody knows whether with the {floor} asked for"
        return f"{_meet(report, inside)} the budget of {budget}, but {why}."
    best = max(options, key=lambda option: option.speedup or 0.0)
    worth = _worth(report, best)
    if v.is_fast_enough(report, best.speedup):
        worth += ", but that was measured too unsteadily to count on it"
    if len(options) == 1:
        return f"{f.capital(_name(best))} does not meet the budget of {budget}: it is {worth}."
    return f"None of them meets the budget of {budget}: the fastest, {_name(best)}, is {worth}."


def _at(report: Report, latency: Latency | None) -> float | None:
    """At the budget's percentile."""
    return getattr(latency, report.budget.percentile) if latency is not None else None


def _name(option: Alternative) -> str:
    return f"dense {option.precision}"


def _meet(report: Report, options: list[Alternative]) -> str:
    """``Dense int8 (2.30× faster, −0.13 points) meets``."""
    names = " and ".join(f"{_name(option)} ({_worth(report, option)})" for option in options)
    return f"{f.capital(names)} {'meets' if len(options) == 1 else 'meet'}"


def _accurate(report: Report, option: Alternative) -> bool | None:
    """Whether it keeps the accuracy that was asked for, as far as test images tell; None where there are none."""
    floor = report.budget.min_accuracy
    if floor is None:
        return True
    return None if option.accuracy is None else option.accuracy >= floor


def _change(report: Report, option: Alternative) -> float | None:
    if option.accuracy is None or report.dense.accuracy is None:
        return None
    return option.accuracy - report.dense.accuracy


def _worth(report: Report, option: Alternative) -> str:
    """``1.43× faster, −0.12 points``."""
    ratio, change = option.speedup, _change(report, option)
    if ratio is None:
        speed = "not measured"
    else:
        speed = f"{f.times(ratio)} faster" if ratio >= 1 else f"{f.times(1 / ratio)} slower"
    return speed + (f", {f.points(change)}" if change is not None else "")
