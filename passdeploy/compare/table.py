"""The tables of a comparison, for the terminal and as Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from passdeploy.compare.rows import Row
from passdeploy.compare.statistics import Cell, EqualAccuracy, Mean, budgets, cells, equal_accuracy, reference_of
from passdeploy.reporting import format as f
from passdeploy.reporting.markdown import escape, table

if TYPE_CHECKING:
    from rich.console import RenderableType

HEAD = ("method", "accuracy, %", "against {}", "speed-up", "MACs", "search + tuning", "outcome")
OVER = "†"
"""Beside an accuracy to which a network that is slower than was asked has contributed."""


def _share(value: Mean | None, sign: bool = False) -> str:
    if value is None:
        return f.NONE
    middle = f"{100 * value.value:+.2f}" if sign else f"{100 * value.value:.2f}"
    return (middle + (f" ± {100 * value.half:.2f}" if value.half is not None else "")).replace("-", f.MINUS)


def _accuracy(cell: Cell, most: int) -> str:
    few = f" ({cell.accuracy.n} of {most} seeds)" if cell.accuracy and cell.accuracy.n < most else ""
    return _share(cell.accuracy) + few + (f" {OVER}" if cell.over_budget else "")


def outcomes(cell: Cell) -> str:
    """What became of a method's seeds at a budget."""
    counted = Counter(cell.statuses)
    if len(counted) == 1:
        only = next(iter(counted)).replace("_", " ")
        return only if cell.seeds == 1 else f"{only} ({cell.seeds} seeds)"
    return ", ".join(f"{n} {status.replace('_', ' ')}" for status, n in counted.items())


def lines(found: Sequence[Cell], budget: str) -> list[tuple[str, ...]]:
    """One line per method at a budget."""
    found = [cell for cell in found if cell.budget == budget]
    most = max((cell.accuracy.n for cell in found if cell.accuracy), default=0)
    return [
        (
            cell.method,
            _accuracy(cell, most),
            _share(cell.difference, sign=True),
            f.times(cell.ratio.value if cell.ratio else None),
            f.times(cell.reduction.value if cell.reduction else None),
            f.seconds(cell.seconds),
            outcomes(cell),
        )
        for cell in found
    ]


def equal_lines(found: Sequence[EqualAccuracy]) -> list[tuple[str, ...]]:
    """One line per method and budget of the reference."""
    return [
        (
            item.budget,
            f.percent(item.accuracy),
            f.times(item.reference_speed),
            item.method,
            f.times(item.speed),
            f.times(item.reference_speed / item.speed) if item.speed else f.NONE,
        )
        for item in found
    ]


def budget_title(rows: Sequence[Row], budget: str) -> str:
    """``2x``, or ``2x fewer MACs``."""
    return budget if rows[0].axis == "latency" else f"{budget} fewer MACs"


@dataclass(frozen=True)
class EqualTexts:
    """What the table of equal accuracy is called, what it shows, and its columns."""

    title: str
    text: str
    head: tuple[str, ...]


def equal_texts(rows: Sequence[Row], reference: str) -> EqualTexts:
    """By what the budgets are in."""
    latency = not rows or rows[0].axis == "latency"
    what = "fast each method is" if latency else "many times fewer MACs each method has"
    return EqualTexts(
        "Speed-up at equal accuracy" if latency else "Fewer MACs at equal accuracy",
        f"How {what} where it has {reference}'s accuracy, linear from the dense network through its budgets; a dash: "
        "outside of what was run.",
        ("budget", "accuracy", reference, "method", "its speed-up there" if latency else "times fewer there", "factor"),
    )


def _judged_on(rows: Sequence[Row], split: str) -> str:
    """What the accuracies are, where that does not go without saying."""
    shown = [row.extra for row in rows if row.split == split and row.accuracy is not None]
    told = {f"Accuracy is the {extra['metric']}. " for extra in shown if "metric" in extra}
    where = {
        "engine": "Accuracies are those in {}, measured on the engines. ",
        "graph": "Accuracies are those in {}, measured on the graphs that the engines are built from (sums in fp32). ",
        "network": "Accuracies are the networks' in fp32, speed-ups the {} engines'. ",
    }
    told |= {where[extra["accuracy_of"]].format(extra["precision"]) for extra in shown if "accuracy_of" in extra}
    return "".join(sorted(told))


def note(rows: Sequence[Row], split: str) -> str:
    """What the numbers are, in words."""
    seeds = sorted({row.seed for row in rows})
    steps = sorted({row.steps for row in rows if row.steps is not None})
    interval = (
        "± is half a 95 % interval over seeds (Student's t); differences are paired by seed. "
        if len(seeds) > 1
        else ("One seed: differences of a few tenths of a point are noise. ")
    )
    shared = (
        f"All methods: {steps[0]} training steps in all. "
        if len(steps) == 1
        else (f"Training steps: {steps[0]} to {steps[-1]}. " if steps else "")
    )
    slow = any(row.status == "over_budget" and row.split == split and row.accuracy is not None for row in rows)
    over = f"{OVER} networks over budget are in the mean. " if slow else ""
    return (
        f"{rows[0].model} on {rows[0].data}, {split} split, seed{'s' if len(seeds) > 1 else ''} "
        f"{', '.join(map(str, seeds))}; {rows[0].device}. {shared}{_judged_on(rows, split)}{interval}{over}"
        f"{_measured(rows)}"
    )


def nothing_measured(rows: Sequence[Row]) -> bool:
    """Whether all that is said of budgets is a prediction: the target's engines can't be timed here."""
    return all(row.ratio is None for row in rows) and any(row.status == "unverified" for row in rows)


def _measured(rows: Sequence[Row]) -> str:
    """What speed-ups are, in words."""
    none = nothing_measured(rows)
    if rows[0].axis == "macs":
        steered = "nothing was measured" if none else "speed-ups are measured, but nothing was steered by them"
        return f"Budgets are in MACs; {steered}."
    if none:
        return "Nothing was measured: that budgets are met is what the latency model predicts."
    return "Speed-ups are measured on the compiled engines, interleaved with the dense one."


def stages(rows: Sequence[Row]) -> str:
    """What a row is, in words."""
    closed = bool(rows) and rows[0].axis == "latency" and not nothing_measured(rows)
    return f"Every row is a whole run: search, {'closed loop, ' if closed else ''}fine-tuning, compiled engine."


def lost(failed: Mapping[str, str]) -> str:
    """What could not finish, as Markdown; empty when all did."""
    if not failed:
        return ""
    return "## Not finished\n\n" + "\n".join(f"- {escape(run)}: {escape(why)}" for run, why in failed.items())


def markdown(rows: Sequence[Row], split: str, reference: str | None = None) -> str:
    """All tables."""
    reference = reference or reference_of(rows) or "pass"
    if not rows:
        return "No results yet.\n"
    found = cells(rows, split, reference)
    head = tuple(title.format(reference) for title in HEAD)
    parts = [note(rows, split)]
    for budget in budgets(rows):
        parts.append(f"### {budget_title(rows, budget)}")
        parts.append(table(head, [[escape(cell) for cell in line] for line in lines(found, budget)]))
    equal = equal_lines(equal_accuracy(rows, split, reference))
    if equal:
        texts = equal_texts(rows, reference)
        parts += [f"### {texts.title}", texts.text]
        parts.append(table(texts.head, [[escape(cell) for cell in line] for line in equal]))
    return "\n\n".join(parts) + "\n"


def render(rows: Sequence[Row], split: str, reference: str | None = None) -> RenderableType:
    """All tables for the terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    reference = reference or reference_of(rows) or "pass"
    if not rows:
        return Text("No results yet.")
    found = cells(rows, split, reference)
    head = tuple(title.format(reference) for title in HEAD)
    parts: list[RenderableType] = []

    def add(title: str, head: Sequence[str], body: Sequence[Sequence[str]], left: tuple[str, ...]) -> None:
        shown = Table(title=Text(title), title_justify="left", box=None, pad_edge=False, header_style="dim")
        for name in head:
            shown.add_column(Text(name), justify="left" if name in left else "right")
        for line in body:
            shown.add_row(*map(Text, line))  # names may hold brackets, which would be taken for markup
        parts.append(shown)

    for budget in budgets(rows):
        add(f"\n{budget_title(rows, budget)}", head, lines(found, budget), ("method", "outcome"))
    equal = equal_lines(equal_accuracy(rows, split, reference))
    if equal:
        texts = equal_texts(rows, reference)
        add(f"\n{texts.title}", texts.head, equal, ("budget", "method"))
    parts.append(Text("\n" + note(rows, split), style="dim"))
    return Group(*parts)
