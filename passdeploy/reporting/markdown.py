"""The report as Markdown: short, tables, fit for a pull request."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from passdeploy.reporting import alternatives, layers, masked
from passdeploy.reporting import format as f
from passdeploy.reporting.schema import Report
from passdeploy.reporting.verdict import (
    Check,
    asked,
    checks,
    numbers,
    removed_with_block,
    setting,
    subject,
    verdict,
    whole,
)

_SIGNS = {True: "✅", False: "❌", None: f.NONE}


def escape(text: object) -> str:
    """`text` so that it stays inside one table cell and is no markup."""
    result = " ".join(str(text).split())
    for character in "\\`*_[]|":
        result = result.replace(character, "\\" + character)
    return result.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def table(head: Sequence[str], rows: Iterable[Sequence[object]], right: int = 1) -> str:
    """A Markdown table; columns from the index `right` on are right-aligned. Cells are taken as they are."""
    rule = ["---" if i < right else "---:" for i in range(len(head))]
    lines = [head, rule, *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def render_markdown(report: Report) -> str:
    """The whole page; everything in it comes from `report`."""
    said = verdict(report)
    sign = {"good": "✅", "bad": "❌"}.get(said.tone, "⚠️")
    parts = [
        f"# {sign} {escape(subject(report))}: {escape(said.headline)}",
        f"**{said.label}**. {escape(said.detail)}",
        f"{escape(report.target.device)}; {escape(setting(report))}; budget {escape(asked(report))}; "
        f"method {escape(report.method)}, seed {report.seed}.",
        *(f"> {escape(message)}" for message in report.messages or []),
        _networks(report),
        _alternatives(report),
        "## Proof and health\n\n" + check_table(checks(report)[1:]),
        _groups(report),
        _whole(report),
        _masked(report),
        _layers(report),
        _reasons(report),
        _budgets(report),
        _imported(report),
        _run(report),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def check_table(rows: Iterable[Check]) -> str:
    """Checks with their outcome as a sign and in words."""
    return table(
        ("", "Check", "Outcome"),
        [("⚠️" if c.warning else _SIGNS[c.ok], escape(c.name), escape(c.message)) for c in rows],
        3,
    )


def _networks(report: Report) -> str:
    return table(("", "dense", "pruned", "change"), [[escape(cell) for cell in row] for row in numbers(report)])


def _alternatives(report: Report) -> str:
    if report.alternatives is None:
        return ""
    rows = [[escape(cell) for cell in row] for row in alternatives.rows(report)]
    missing = [f"- {escape(name)}: {escape(reason)}." for name, reason in alternatives.missing(report)]
    parts = [
        "## What else could be done",
        escape(alternatives.said(report)),
        table(alternatives.HEAD, rows) if rows else "",
        escape(alternatives.session(report)),
        "\n".join(missing),
    ]
    return "\n\n".join(part for part in parts if part)


def _layers(report: Report) -> str:
    if not report.layers:
        return ""
    text = table(layers.HEAD, [[escape(cell) for cell in row] for row in layers.rows(report)])
    return (
        f"## Where the time goes\n\n{escape(layers.said(report))}\n\n"
        f"<details><summary>{len(report.layers)} parts, by the runtime's profiler</summary>\n\n{text}\n\n"
        f"{escape(layers.NOTE)}\n\n</details>"
    )


def _groups(report: Report) -> str:
    if not report.groups:
        return ""
    blocks = [group for group in report.groups if group.kind == "depth"]
    channels = [group for group in report.groups if group.kind == "channel"]
    lines = ["## Structure"]
    if blocks:
        removed = [escape(group.name.removeprefix("depth:")) for group in blocks if not group.kept]
        left = f"{len(blocks) - len(removed)} of {len(blocks)} residual blocks kept"
        lines.append(left + (f"; removed: {', '.join(removed)}." if removed else "."))
    if channels:
        gone = removed_with_block(report.groups)
        rows = [
            (
                escape(g.name),
                "with its block" if g.name in gone else f"{g.kept} / {g.units}",
                f.percent(g.share_macs, 1),
            )
            for g in channels
        ]
        text = table(("group", "units kept", "share of dense MACs"), rows)
        lines.append(f"<details><summary>{len(channels)} channel groups</summary>\n\n{text}\n\n</details>")
    return "\n\n".join(lines)


def _whole(report: Report) -> str:
    rows = [(", ".join(map(escape, modules)), escape(reason)) for reason, modules in whole(report)]
    if not rows:
        return ""
    text = table(("module", "why it stays whole"), rows, 2)
    return f"<details><summary>{len(report.frozen or {})} not prunable</summary>\n\n{text}\n\n</details>"


def _masked(report: Report) -> str:
    if report.masked is None:
        return ""
    rows = masked.rows(report)
    text = f"## Masked is not thin\n\n{escape(masked.said(report))}"
    return text + ("\n\n" + table(("engine", "latency p50", "speed-up"), rows) if rows else "")


def _reasons(report: Report) -> str:
    if not report.why_not_faster:
        return ""
    lines = [f"- {escape(r.text)}" + (f" ({f.percent(r.share, 0)})" if r.share else "") for r in report.why_not_faster]
    return "## Why not faster\n\n" + "\n".join(lines)


def _budgets(report: Report) -> str:
    if not report.budgets or len(report.budgets) < 2:
        return ""
    rows = [
        (
            escape(b.asked),
            b.status.replace("_", " "),
            f.times(b.speedup),
            f.milliseconds(b.latency_ms),
            f.percent(b.accuracy),
        )
        for b in report.budgets
    ]
    return "## All budgets of this search\n\n" + table(("budget", "status", "speed-up", "latency", "accuracy"), rows, 2)


def _imported(report: Report) -> str:
    if not report.imported:
        return ""
    rows = [
        (
            escape(item.label),
            escape(item.source),
            item.scope.replace("_", " "),
            f.milliseconds(item.latency_ms.p50),
            f.milliseconds(item.latency_ms.p99),
            item.latency_ms.n,
        )
        for item in report.imported
    ]
    text = table(("engine", "source", "scope", "p50", "p99", "calls"), rows, 3)
    return f"## Measured by other tools\n\nNot interleaved with the engines above: compare with care.\n\n{text}"


def _run(report: Report) -> str:
    rows: list[tuple[str, str]] = []
    provenance, environment = report.provenance, report.environment
    if report.predictor is not None:
        p = report.predictor
        error = f"mean {f.percent(p.mape, 1)}, largest {f.percent(p.max_ape, 1)} on {p.n} structures"
        rows.append(("latency model", f"{p.kind}: {error}; repeatability {f.percent(p.repeatability, 1)}"))
    if report.timing_s:
        total = f.seconds(sum(report.timing_s.values()))
        rows.append(
            ("time", ", ".join(f"{escape(k)} {f.seconds(v)}" for k, v in report.timing_s.items()) + f"; {total}")
        )
    for name, value in (("CPU", environment.cpu), ("GPU", environment.gpu), ("driver", environment.driver)):
        if value:
            rows.append((name, escape(value)))
    if environment.versions:
        rows.append(("versions", escape(", ".join(f"{k} {v}" for k, v in environment.versions.items()))))
    if provenance is not None:
        for name, text in (("engine SHA-256", provenance.engine_sha256), ("config SHA-256", provenance.config_sha256)):
            if text:
                rows.append((name, f"`{text}`"))
        splits = ", ".join(
            f"{name} {split.images}" + (f" ({split.used_for})" if split.used_for else "")
            for name, split in provenance.splits.items()
        )
        if splits:
            rows.append(("images", escape(splits)))
    text = "## Run\n\n" + table(("", ""), rows, 2)
    if provenance is not None and provenance.command:
        text += f"\n\n```\n{provenance.command.replace('```', '')}\n```"
    return text
