"""Many reports over time, as a pandas table: the trend over commits, and the best trade-offs over runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
_NUMBERS = ("batch", "threads", "seed")
"""Columns whose values say nothing without their names."""


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
    """Per configuration (setting, method, budget, seed), named by what tells it from the others, its rows over time."""
    keys = [*SETTING, "method", "budget", "seed"]
    named = ("model", "target", "method", "budget")
    more = [key for key in keys if key not in named and frame[key].nunique(dropna=False) > 1]
    result = {}
    for _, group in frame.groupby(keys, dropna=False, sort=False):
        record = _plain(group)[0]
        words = [f"{record['model'] or 'network'} {record['target']} {record['method']} {record['budget']}"]
        words += [f"{key} {record[key]}" if key in _NUMBERS else str(record[key] or f"no {key}") for key in more]
        result[" ".join(words)] = group
    return result


def render_history(frame: pd.DataFrame) -> str:
    """A self-contained HTML page: speed-up, latency and accuracy over commits, and the best trade-offs."""
    from passdeploy.reporting import plots
    from passdeploy.reporting.html import environment

    lines = trends(frame)
    places: dict[tuple[Any, ...], dict[str, pd.DataFrame]] = {}
    for name, group in lines.items():
        places.setdefault(tuple(_plain(group[SETTING])[0].values()), {})[name] = group
    columns = (
        ("measured speed-up over the dense engine", "speedup", 1.0),
        ("latency of the pruned engine, ms", "pruned_ms", 1.0),
        ("accuracy, %", "accuracy", 100.0),
    )
    settings = []
    for groups in places.values():
        rows = sorted(index for group in groups.values() for index in group.index)
        labels = [_label(record) for record in frame.loc[rows].to_dict("records")]
        figures = [
            plots.trend(title, labels, {name: _line(g, column, factor, rows) for name, g in groups.items()})
            for title, column, factor in columns
        ]
        settings.append((list(groups), [figure for figure in figures if figure is not None]))
    front = pareto_front(frame)
    return (
        environment()
        .get_template("history.html.j2")
        .render(
            settings=[(names, figures) for names, figures in settings if figures],
            names=list(lines),
            front=_plain(front),
            rows=_plain(frame.iloc[::-1]),
        )
    )


def _plain(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows with None for what is missing."""
    import pandas as pd

    return [{str(k): None if pd.isna(x) else x for k, x in record.items()} for record in frame.to_dict("records")]


def _line(group: pd.DataFrame, column: str, factor: float, rows: Sequence[Any]) -> list[float | None]:
    """A value for each of the rows (by index); None where it has none or the row is another configuration's."""
    there = group[column].dropna()
    return [float(there[index]) * factor if index in there.index else None for index in rows]


def _label(record: dict[Any, Any]) -> str:
    commit, created = record["commit"], record["created"]
    if isinstance(commit, str):
        return commit[:7] + ("+" if commit.endswith("+") else "")  # of a tree with changes
    return "" if created is None or created != created else f"{created:%m-%d}"
