"""Reports in the formats that continuous integration reads."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

from passdeploy.errors import BadInput, nearest
from passdeploy.reporting import format as f
from passdeploy.reporting import verdict as v
from passdeploy.reporting.comparison import render_comparison, row_names
from passdeploy.reporting.files import dumps
from passdeploy.reporting.html import render_html
from passdeploy.reporting.markdown import escape, render_markdown
from passdeploy.reporting.schema import Report

SUMMARY_LIMIT = 1024 * 1024
"""Bytes that GitHub shows of one step's summary; a longer one is refused as a whole."""


def export(reports: Sequence[Report], form: str) -> str:
    """Renders one report, or several together.

    Args:
        reports: At least one.
        form: A key of `FORMATS`.

    Raises:
        BadInput: No such format, or no report.
    """
    if form not in FORMATS:
        raise BadInput(f"--format {form}: no such format{nearest(form, FORMATS)}")
    if not reports:
        raise BadInput("nothing to report: give at least one run folder or report.json")
    return FORMATS[form](reports)


def as_json(reports: Sequence[Report]) -> str:
    """One report as it is, several as a list."""
    rows = [report.to_json() for report in reports]
    return dumps(rows[0]) if len(rows) == 1 else dumps(rows)


def markdown(reports: Sequence[Report]) -> str:
    """One report's page, several as a comparison."""
    return render_markdown(reports[0]) if len(reports) == 1 else render_comparison(reports, "md")


def html(reports: Sequence[Report]) -> str:
    """One report's page, several as a comparison."""
    return render_html(reports[0]) if len(reports) == 1 else render_comparison(reports, "html")


def history(reports: Sequence[Report]) -> str:
    """One HTML page: the trend over commits, and the best trade-offs over runs."""
    from passdeploy.reporting.history import history as table
    from passdeploy.reporting.history import render_history

    return render_history(table(reports))


def github_action_benchmark(reports: Sequence[Report]) -> str:
    """Entries for benchmark-action/github-action-benchmark with ``tool: customSmallerIsBetter``.

    Per report: latency of the pruned engine at p50 and at the budget's percentile, the same over the dense engine's
    (which a slower or faster runner does not change), and the error, 100 % minus the accuracy. What was not measured is
    left out.
    """
    entries: list[dict[str, object]] = []
    for name, report in zip(_series(reports), reports, strict=True):
        extra = f"{report.target.device}; {v.setting(report)}; {report.status}"
        interval = report.speedup.latency_ci95
        for percentile in dict.fromkeys(("p50", report.budget.percentile)):
            latency = report.pruned.latency_ms if report.pruned else None
            value = None if latency is None else getattr(latency, percentile)
            if value is not None:
                entries.append({"name": f"{name} / {percentile}", "unit": "ms", "value": value, "extra": extra})
        if report.speedup.latency:
            ratio: dict[str, object] = {"unit": "pruned / dense", "value": round(1 / report.speedup.latency, 5)}
            if interval is not None and interval[0] > 0:
                ratio["range"] = f"{1 / interval[1]:.4f} to {1 / interval[0]:.4f}"
            entries.append({"name": f"{name} / latency ratio", **ratio, "extra": extra})
        if report.pruned is not None and report.pruned.accuracy is not None:
            error = round(100 * (1 - report.pruned.accuracy), 4)
            entries.append(
                {"name": f"{name} / error of {v.metric(report)}", "unit": "%", "value": error, "extra": extra}
            )
    return json.dumps(entries, indent=1, ensure_ascii=False) + "\n"


def junit(reports: Sequence[Report]) -> str:
    """JUnit XML: a suite per report, a case per check. Not checked is skipped; a health warning is no failure."""
    root = ElementTree.Element("testsuites", name="passdeploy")
    for name, report in zip(_series(reports), reports, strict=True):
        checks = v.checks(report)
        failed = [c for c in checks if c.ok is False and not c.warning]
        skipped = [c for c in checks if c.ok is None]
        suite = ElementTree.SubElement(
            root,
            "testsuite",
            name=_xml(name),
            tests=str(len(checks)),
            failures=str(len(failed)),
            errors="0",
            skipped=str(len(skipped)),
            time=f"{sum(report.timing_s.values()):.3f}",
        )
        if report.provenance is not None and report.provenance.created:
            suite.set("timestamp", _xml(report.provenance.created[:19]))  # UTC; the format knows no zones
        for check in checks:
            case = ElementTree.SubElement(suite, "testcase", classname=_xml(name), name=_xml(check.name), time="0")
            message = _xml(check.message)
            if check in failed:
                ElementTree.SubElement(case, "failure", message=message, type=report.status).text = message
            elif check.ok is None:
                ElementTree.SubElement(case, "skipped", message=message)
            else:
                ElementTree.SubElement(case, "system-out").text = message
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _series(reports: Sequence[Report]) -> list[str]:
    """Names that stay the same from commit to commit, so that a chart joins the right points."""
    names: list[str] = []
    for report, row in zip(reports, row_names(reports), strict=True):
        name = f"{v.subject(report)} / {report.target.name} {report.target.backend} {report.target.precision}"
        name += f" batch {report.target.batch}"
        name += f" threads {report.target.threads}" if report.target.threads > 1 else ""
        name += f" {report.budget.percentile}" if report.budget.percentile != "p50" else ""
        name += " end to end" if report.budget.scope == "end_to_end" else ""
        name += f" / {report.method} {report.budget.asked}"
        names.append(name if name not in names else f"{name} / {row} #{len(names) + 1}")
    return names


def _xml(text: str) -> str:
    """Without the control characters that XML can't hold."""
    return re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "", text)


def write_step_summary(reports: Sequence[Report], environ: Mapping[str, str] | None = None) -> Path | None:
    """Appends the Markdown to the file that ``$GITHUB_STEP_SUMMARY`` names; does nothing where it is not set.

    Returns:
        The file, or None.

    Raises:
        BadInput: The file can't be written.
    """
    name = (os.environ if environ is None else environ).get("GITHUB_STEP_SUMMARY", "")
    if not name:
        return None
    path = Path(name)
    text = markdown(reports)
    try:
        before = path.stat().st_size if path.exists() else 0
        if before + len(text.encode()) + 1 > SUMMARY_LIMIT:
            text = (
                "\n".join(
                    f"- {v.verdict(r).label}: {f.times(r.speedup.latency)} {escape(v.subject(r))}" for r in reports
                )
                + "\n"
            )
        with path.open("a", encoding="utf-8") as file:
            file.write("\n" + text if before else text)
    except OSError as error:
        raise BadInput(f"GITHUB_STEP_SUMMARY={name}: cannot be written ({error.strerror})") from None
    return path


FORMATS: dict[str, Callable[[Sequence[Report]], str]] = {
    "json": as_json,
    "markdown": markdown,
    "html": html,
    "history": history,
    "github-action-benchmark": github_action_benchmark,
    "junit": junit,
}
