"""Several runs, or several budgets of one search, on one page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from passdeploy.errors import BadInput
from passdeploy.reporting import format as f
from passdeploy.reporting import plots
from passdeploy.reporting import verdict as v
from passdeploy.reporting.schema import Report


def render_comparison(
    reports: Sequence[Report], form: Literal["html", "md"] = "html", names: Sequence[str] | None = None
) -> str:
    """A page with a row per run and, per device, setting, metric and data, their accuracy-latency plane.

    Args:
        reports: At least one, in the order in which they are to stand.
        form: Self-contained HTML, or Markdown.
        names: Of the rows; when None the budget, and whatever tells them apart.

    Raises:
        BadInput: No report was given.
    """
    if not reports:
        raise BadInput("nothing to compare: give at least one run folder or report.json")
    labels = list(names) if names is not None else _told_apart(row_names(reports), reports)
    if form == "md":
        return _markdown(reports, labels)
    from passdeploy.reporting.html import environment

    return (
        environment()
        .get_template("comparison.html.j2")
        .render(
            title=title(reports),
            rows=list(zip(labels, reports, strict=True)),
            settings=[
                (place, plots.comparison_plane(members), plots.comparison_plane(members, narrow=True))
                for place, members in by_setting(reports).items()
            ],
            structures=[
                (label, plots.skyline(report.groups, 520.0))
                for label, report in zip(labels, reports, strict=True)
                if report.groups
            ],
        )
    )


def by_setting(reports: Sequence[Report]) -> dict[str, list[Report]]:
    """Reports that may stand in one plane: the same device, settings, percentile and scope, metric and data."""
    result: dict[str, list[Report]] = {}
    judged = [(v.metric(report), report.provenance.data if report.provenance else None) for report in reports]
    for report, (metric, data) in zip(reports, judged, strict=True):
        place = f"{report.target.device}: {v.setting(report)}, {report.budget.percentile}"
        place += ", end to end" if report.budget.scope == "end_to_end" else ""
        if len(set(judged)) > 1:
            place += f"; {metric}" + (f" on {data}" if data else "")
        result.setdefault(place, []).append(report)
    return result


def row_names(reports: Sequence[Report]) -> list[str]:
    """As short as tells the rows apart: the budget, and whatever else differs."""
    names: list[str] = []
    many = {
        "subject": len({v.subject(r) for r in reports}) > 1,
        "target": len({r.target.name for r in reports}) > 1,
        "method": len({r.method for r in reports}) > 1,
        "setting": len({(v.setting(r), r.budget.percentile, r.budget.scope) for r in reports}) > 1,
        "seed": len({r.seed for r in reports}) > 1,
    }
    for report in reports:
        parts = [v.subject(report)] if many["subject"] else []
        parts += [report.target.name] if many["target"] else []
        parts += [report.method] if many["method"] else []
        parts.append(report.budget.asked)
        parts += _setting_words(report, reports) if many["setting"] else []
        parts += [f"seed {report.seed}"] if many["seed"] else []
        names.append(" ".join(parts))
    return names


def _told_apart(names: list[str], reports: Sequence[Report]) -> list[str]:
    """Runs of one configuration by their device, commit or time, else by their place."""
    made = [report.provenance for report in reports]
    tells: list[list[str | None]] = [
        [report.target.device for report in reports],
        [f"{each.commit[:7]}{'+' * each.commit.endswith('+')}" if each and each.commit else None for each in made],
        [each.created[:19].replace("T", " ") if each and each.created else None for each in made],
        [f"#{index + 1}" for index in range(len(reports))],
    ]
    for told in tells:
        alike = {name: {word for other, word in zip(names, told, strict=True) if other == name} for name in names}
        names = [
            f"{name} {word}" if word and len(alike[name]) > 1 else name for name, word in zip(names, told, strict=True)
        ]
    return names


def _setting_words(report: Report, reports: Sequence[Report]) -> list[str]:
    """Of one report, the settings in which the reports differ."""
    words = [
        [r.target.backend, r.target.precision, f"batch {r.target.batch}", f"threads {r.target.threads}",
         r.budget.percentile, r.budget.scope.replace("_", " ")]
        for r in (report, *reports)
    ]  # fmt: skip
    return [own for own, *others in zip(*words, strict=True) if len(set(others)) > 1]


def title(reports: Sequence[Report]) -> str:
    """What all of them have in common."""
    subjects = list(dict.fromkeys(v.subject(report) for report in reports))
    runs = f"{len(reports)} run" + ("s" if len(reports) > 1 else "")
    return f"{runs} of {subjects[0]}" if len(subjects) == 1 else f"{runs} of {len(subjects)} networks"


def _markdown(reports: Sequence[Report], labels: Sequence[str]) -> str:
    from passdeploy.reporting.markdown import escape, table

    signs = {"good": "✅", "bad": "❌"}
    rows = []
    for label, report in zip(labels, reports, strict=True):
        said, pruned = v.verdict(report), report.pruned
        rows.append(
            (
                signs.get(said.tone, "⚠️"),
                escape(label),
                said.label,
                f.times(report.speedup.latency),
                f.interval(report.speedup.latency_ci95),
                f.milliseconds(v.percentile_ms(report, "pruned")),
                f.percent(pruned.accuracy if pruned else None),
                f.points(v.accuracy_change(report)),
                f.times(report.speedup.macs),
            )
        )
    head = ("", "run", "status", "speed-up", "95 %", "latency", "accuracy", "change", "MACs")
    places = "\n".join(f"- {escape(place)}: {_counted(members)}" for place, members in by_setting(reports).items())
    return f"# {escape(title(reports))}\n\n{table(head, rows, 3)}\n\nDevices and settings:\n\n{places}\n"


def _counted(reports: Sequence[Report]) -> str:
    """How many, and of how many of them no latency is claimed."""
    unmeasured = sum(report.status == "unverified" or not report.target.attached for report in reports)
    return str(len(reports)) + (f", {unmeasured} of them not measured" if unmeasured else "")
