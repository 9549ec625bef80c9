"""What a comparison leaves in its folder: compare.md, compare.html, compare.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from passdeploy.compare.plot import tradeoff
from passdeploy.compare.rows import Row
from passdeploy.compare.runner import Outcome
from passdeploy.compare.statistics import budgets, cells, equal_accuracy, reference_of
from passdeploy.compare.table import (
    HEAD,
    budget_title,
    equal_lines,
    equal_texts,
    lines,
    lost,
    markdown,
    note,
    stages,
)
from passdeploy.workspace import write_atomic, write_json


def summary(
    rows: Sequence[Row], split: str, reference: str | None = None, failed: Mapping[str, str] | None = None
) -> dict[str, object]:
    """The statistics as JSON."""
    reference = reference or reference_of(rows)
    return {
        "schema": "passdeploy.comparison/1",
        "split": split,
        "reference": reference,
        "axis": rows[0].axis if rows else None,
        "cells": [dataclasses.asdict(cell) for cell in cells(rows, split, reference)],
        "equal_accuracy": [dataclasses.asdict(item) for item in equal_accuracy(rows, split, reference)],
        "failed": dict(failed or {}),
    }


def html(rows: Sequence[Row], split: str, reference: str | None = None, failed: Mapping[str, str] | None = None) -> str:
    """A self-contained page."""
    from passdeploy.reporting.html import environment

    reference = reference or reference_of(rows) or "pass"
    found = cells(rows, split, reference)
    subject = f"{rows[0].model} on {rows[0].data}" if rows else "nothing yet"
    return (
        environment()
        .get_template("compare.html.j2")
        .render(
            title=f"{len({row.method for row in rows})} methods, {subject}",
            reference=reference,
            figure=tradeoff(rows, split, reference),
            head=[name.format(reference) for name in HEAD],
            tables=[(budget_title(rows, budget), lines(found, budget)) for budget in budgets(rows)],
            equal_texts=equal_texts(rows, reference),
            equal=equal_lines(equal_accuracy(rows, split, reference)),
            note=note(rows, split) if rows else "",
            failed=failed or {},
            stages=stages(rows),
        )
    )


def write_pages(outcome: Outcome, split: str, folder: Path) -> None:
    """Writes all three."""
    rows, failed = outcome.rows, outcome.failed
    text = "\n\n".join(filter(None, ("# Comparison", markdown(rows, split).rstrip(), lost(failed)))) + "\n"
    write_json(folder / "compare.json", summary(rows, split, failed=failed))
    write_atomic(folder / "compare.md", text)
    write_atomic(folder / "compare.html", html(rows, split, failed=failed))
