"""Many reports over time, as a pandas table: the trend over commits, and the best trade-offs over runs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from passdeploy.errors import BadInput
from passdeploy.reporting import verdict as v
from passdeploy.reporting.files import find_reports, load_report
from passdeploy.reporting.schema import Report

if TYPE_CHECKING:
    import pandas as pd

SETTING = ["model", "data", "target", "device", "backend", "precision", "batch", "threads", "percentile", "scope"]
"""Columns that have to agree for latencies to stand on one axis."""


def row(report: Report, source: str = "") -> dict[str, Any]:
    """One report as a flat row; missing values are None."""
    provenance, pruned, interval = report.provenance, report.pruned, report.speedup.latency_ci95
    return {
        "created": provenance.created if provenance else None,
        "commit": provenance.commit if provenance else None,
        "model": provenance.model if provenance else None,
        "data": provenance.data if provenance else None,
        "target": report.target.name,
        "device": report.target.device,
        "backend": report.target.backend,
        "precision": report.target.precision,
        "batch": report.target.batch,
        "threads": report.target.threads,
        "method": report.method,
        "seed": report.seed,
        "budget": report.budget.asked,
        "percentile": report.budget.percentile,
        "scope": report.budget.scope,
        "status": report.status,
        "dense_ms": v.percentile_ms(report, "dense"),
        "pruned_ms": v.percentile_ms(report, "pruned"),
        "speedup": report.speedup.latency,
        "speedup_low": interval[0] if interval else None,
        "speedup_high": interval[1] if interval else None,
        "dense_accuracy": report.dense.accuracy,
        "accuracy": pruned.accuracy if pruned else None,
        "macs": pruned.macs if pruned else None,
        "params": pruned.params if pruned else None,
        "realisation": report.speedup.realisation,
        "seconds": sum(report.timing_s.values()),
        "source": source,
    }


def history(reports: Iterable[Report | Path | str]) -> pd.DataFrame:
    """A row per report, the oldest first.

    Args:
        reports: Reports, report.json files, run folders, or folders that are searched for report.json.

    Raises:
        BadInput: A file is no report, or nothing was found.
    """
    import pandas as pd

    rows = []
    for item in reports:
        if isinstance(item, Report):
            rows.append(row(item))
        else:
            rows += [row(load_report(path), str(path)) for path in find_reports(Path(item))]
    if not rows:
        raise BadInput("no reports: give run folders or report.json files")
    frame = pd.DataFrame(rows)
    frame["created"] = pd.to_datetime(frame["created"], utc=True, errors="coerce", format="ISO8601")
    return frame.sort_values("created", kind="stable", na_position="first").reset_index(drop=True)


def pareto_front(frame: pd.DataFrame, cost: str = "pruned_ms", value: str = "accuracy") -> pd.DataFrame:
    """The rows that no other row of the same setting beats on both `cost` (less) and `value` (more)."""
    import pandas as pd

    kept = []
    usable = frame.dropna(subset=[cost, value])
    for _, group in usable.groupby(SETTING, dropna=False, sort=False):
        ranked = group.sort_values([cost, value], ascending=[True, False], kind="stable")
        best = ranked[value].cummax().shift(fill_value=float("-inf"))
        kept.append(ranked[ranked[value] > best])
    return pd.concat(kept) if kept else usable


def trends(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Per configuration (setting, method, budget, seed), its rows over time, for those that ran more than once."""
    keys = [*SETTING, "method", "budget", "seed"]
    result = {}
    for _, group in frame.groupby(keys, dropna=False, sort=False):
        first = group.iloc[0]
        name = f"{first['model'] or 'network'} {first['target']} {first['method']} {first['budget']}"
        while name in result:
            name += "'"
        result[name] = group
    return result


def render_history(frame: pd.DataFrame) -> str:
    """A self-contained HTML page: speed-up, latency and accuracy over commits, and the best trade-offs."""
    from passdeploy.reporting import plots
    from passdeploy.reporting.html import environment

    labels = [_label(record) for record in frame.to_dict("records")]
    columns = (
        ("measured speed-up over the dense engine", "speedup", 1.0),
        ("latency of the pruned engine, ms", "pruned_ms", 1.0),
        ("accuracy, %", "accuracy", 100.0),
    )
    figures = []
    for title, column, factor in columns:
        lines = {name: _line(group, column, factor, len(frame)) for name, group in trends(frame).items()}
        figures.append(plots.trend(title, labels, lines))
    front = pareto_front(frame)
    return (
        environment()
        .get_template("history.html.j2")
        .render(
            figures=[figure for figure in figures if figure is not None],
            names=list(trends(frame)),
            front=_plain(front),
            rows=_plain(frame.iloc[::-1]),
        )
    )


def _plain(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows with None for what is missing."""
    import pandas as pd

    return [{str(k): None if pd.isna(x) else x for k, x in record.items()} for record in frame.to_dict("records")]


def _line(group: pd.DataFrame, column: str, factor: float, n: int) -> list[float | None]:
    values: list[float | None] = [None] * n
    for index, value in group[column].items():
        if value is not None and value == value:
            values[int(str(index))] = float(value) * factor
    return values


def _label(record: dict[Any, Any]) -> str:
    commit, created = record["commit"], record["created"]
    if isinstance(commit, str):
        return commit[:7]
    return "" if created is None or created != created else f"{created:%m-%d}"
