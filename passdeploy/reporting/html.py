"""The report as one self-contained HTML file: inline SVG and CSS, no scripts, nothing loaded from elsewhere."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import jinja2

from passdeploy.reporting import alternatives, layers, masked, plots
from passdeploy.reporting import format as f
from passdeploy.reporting import verdict as v
from passdeploy.reporting.schema import Report


class Tile(NamedTuple):
    """One of the large numbers under the headline; a `guess` is set in a paler colour."""

    name: str
    value: str
    note: str
    guess: bool = False


@cache
def environment() -> jinja2.Environment:
    """Templates of this package; everything is escaped but what the plots return."""
    result = jinja2.Environment(
        loader=jinja2.PackageLoader("passdeploy.reporting", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    result.globals.update(f=f, v=v, alternatives=alternatives, layers=layers, masked=masked)
    result.globals.update(share_bar=plots.share_bar, pair_bar=plots.pair_bar)
    return result


def render_html(report: Report) -> str:
    """The whole page; everything in it comes from `report`."""
    curves, proof = report.curves, report.equivalence
    wanted = _asked_speedup(report)
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            report=report,
            tiles=tiles(report),
            numbers=v.numbers(report),
            proofs=v.proofs(report),
            links=(proof.masked_vs_thin, proof.thin_vs_onnx, proof.onnx_vs_engine),
            measured=report.dense.latency_ms is not None,
            over_latency=plots.over_latency(report),
            gone=v.removed_with_block(report.groups or []),
            whole=v.whole(report),
            blocks=[group for group in report.groups or [] if group.kind == "depth"],
            has_before=any(point.kind == "before_finetune" for point in report.accuracy_points or []),
            figures={
                "plane": plots.plane(report),
                "distribution": plots.distribution(report),
                "skyline": plots.skyline(report.groups or []),
                "skyline_narrow": plots.skyline(report.groups or [], 400.0),
                "loop": plots.closed_loop(report.candidates or [], wanted),
                "stages": plots.stage_bar(list(report.timing_s.items())),
            },
            panels={
                "search": plots.curve_panels(curves.search, 1 / wanted if wanted else None)
                if curves and curves.search
                else [],
                "finetune": plots.curve_panels(curves.finetune) if curves and curves.finetune else [],
            },
            versions=", ".join(f"{name} {version}" for name, version in report.environment.versions.items()),
            settings=", ".join(f"{name}: {value}" for name, value in report.environment.settings.items()),
        )
    )


def _asked_speedup(report: Report) -> float | None:
    """The wanted speed-up over the dense engine: as asked, or what the asked time comes to."""
    typed = report.budget.asked.removesuffix("x")
    if typed != report.budget.asked:
        try:
            return float(typed)
        except ValueError:
            return None
    dense = v.percentile_ms(report, "dense")
    wanted = report.budget.latency_ms
    return dense / wanted if dense is not None and wanted else None


def tiles(report: Report) -> list[Tile]:
    """Speed-up, latency, accuracy and cost."""
    dense, pruned, speed = report.dense, report.pruned, report.speedup
    result = []
    if speed.latency is not None:
        how = "interleaved" if speed.processes is None else f"{len(speed.processes)} fresh processes"
        note = f"95 %: {f.interval(speed.latency_ci95)}, {how}" if speed.latency_ci95 else how
        result.append(Tile("Speed-up, measured", f.times(speed.latency), note))
    elif report.predicted is not None and report.predicted.speedup is not None:
        kind = report.predictor.kind if report.predictor else "analytic"
        result.append(
            Tile("Speed-up, predicted", f"≈ {f.times(report.predicted.speedup)}", f"{kind} model; not measured", True)
        )
    elif report.reachable is not None and report.reachable.speedup is not None:
        best = report.reachable
        note = f"{f.milliseconds(best.latency_ms)}, {'measured' if best.measured else 'predicted'}"
        result.append(Tile("Fastest reachable", f.times(best.speedup), note, not best.measured))
    else:
        result.append(Tile("Speed-up", f.NONE, "not measured"))
    time = v.budget_ms(report)
    budget = "" if time is None else f"budget {f.milliseconds(time)}"
    latency = v.percentile_ms(report, "pruned")
    dense_latency = v.percentile_ms(report, "dense")
    note = ", ".join(part for part in (f"dense {f.milliseconds(dense_latency)}", budget) if part)
    if dense_latency is None:
        # Of an infeasible budget only the fastest there is was measured, which has a tile of its own.
        note = "; ".join(part for part in ("" if report.status == "infeasible" else "not measured", budget) if part)
    result.append(Tile(f"Latency, {report.budget.percentile}", f.beside(latency, time), note))
    kept = pruned.accuracy if pruned else None
    change = v.accuracy_change(report)
    note = (f"{f.points(change)}; " if change is not None else "") + f"dense {f.percent(dense.accuracy)}"
    result.append(Tile(f.capital(v.metric(report)), f.percent(kept), note))
    macs = f.count(pruned.macs) if pruned else f.NONE
    note = f"{f.times(speed.macs)} fewer than {f.count(dense.macs)}" if speed.macs else f"dense {f.count(dense.macs)}"
    result.append(Tile("MACs per image", macs, note))
    return result
