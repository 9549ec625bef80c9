"""What every study shares: its inputs, its findings, the registry and the page."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from passdeploy.compare.plot import tradeoff
from passdeploy.compare.rows import Row, RowFile
from passdeploy.compare.runner import Arm, Plan, run_plan
from passdeploy.compare.statistics import Cell, Mean, budgets, cells
from passdeploy.compare.table import lost, markdown, note, outcomes
from passdeploy.config import GroupsConfig, RunConfig
from passdeploy.console import Ui
from passdeploy.errors import BadInput, PassdeployError, nearest
from passdeploy.workspace import write_atomic, write_json

if TYPE_CHECKING:
    from passdeploy.data.base import ImageData
    from passdeploy.search.method import SearchResult
    from passdeploy.subject import Model

SPLIT = "test"


@dataclass
class Lab:
    """What a study works with.

    Attributes:
        config: Settings that all its runs share.
        seeds: Each arm runs once with each.
        out: Its folder.
        ui: Shows progress.
        model: A factory or a network instead of the configuration's.
        data: A data set instead of the configuration's.
        to: A second data set, for studies that need one.
        command: As typed; None: not from the command line.
        failed: Runs that could not finish, with the reason; the study goes on without them.
    """

    config: RunConfig
    seeds: tuple[int, ...]
    out: Path
    ui: Ui
    model: Model | None = None
    data: ImageData | None = None
    to: str | None = None
    command: str | None = None
    failed: dict[str, str] = field(default_factory=dict)

    def plan(
        self,
        arms: Sequence[Arm],
        *,
        config: RunConfig | None = None,
        folder: str = "",
        model: Model | None = None,
        data: ImageData | None = None,
    ) -> Plan:
        """What `run` runs.

        Args:
            arms: To be run.
            config: Instead of the lab's.
            folder: Inside the lab's, for a second set of runs.
            model: Instead of the lab's, which stands for the lab's own `config.model` only.
            data: Instead of the lab's.
        """
        out = self.out / folder if folder else self.out
        if model is None and (config is None or config.model == self.config.model):
            model = self.model
        return Plan(
            config or self.config, tuple(arms), self.seeds, out, RowFile(out / "compare.jsonl"),
            model, data if data is not None else self.data, SPLIT,
        )  # fmt: skip

    def run(self, plan: Plan) -> list[Row]:
        """Rows of a plan of this lab's.

        Args:
            plan: From `plan`.

        Raises:
            PassdeployError: All of them failed.
        """
        outcome = run_plan(plan, self.ui)
        folder = "" if plan.out == self.out else plan.out.name
        self.failed |= {f"{folder}: {run}" if folder else run: why for run, why in outcome.failed.items()}
        if not outcome.rows and outcome.failed:
            run, why = next(iter(outcome.failed.items()))
            raise PassdeployError(f"all {len(outcome.failed)} runs of the study failed; {run}: {why}")
        return outcome.rows


@dataclass
class Findings:
    """What a study found.

    Attributes:
        question: In a sentence.
        rows: All its results.
        conclusion: Plain sentences, negative results included.
        reference: The arm that the others are compared with.
        sections: Further Markdown, (title, text) each.
        numbers: Further numbers for the JSON file.
        figures: Further figures, by file name without its ending.
        failed: Runs that could not finish, with the reason.
    """

    question: str
    rows: list[Row]
    conclusion: list[str]
    reference: str = "pass"
    sections: list[tuple[str, str]] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, Markup] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


BROUGHT: dict[str, Any] = {"weights": None, "groups": GroupsConfig(), "profile_file": None}
"""Of the configuration, for a network that a study brings: what was said is said of another."""

Study = Callable[[Lab], Findings]
_REGISTRY: dict[str, Study] = {}


def register_study(name: str) -> Callable[[Study], Study]:
    """Registers a study under the name that ``passdeploy study`` takes."""

    def add(study: Study) -> Study:
        _REGISTRY[name] = study
        return study

    return add


def studies() -> dict[str, Study]:
    """All studies by name."""
    import passdeploy.study as package

    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return dict(sorted(_REGISTRY.items()))


def get_study(name: str) -> Study:
    """Raises `BadInput` with the nearest names when there is none of that name."""
    known = studies()
    if name not in known:
        raise BadInput(f"study {name}: no such study{nearest(name, known)}")
    return known[name]


def refuse_unsearched(result: SearchResult, study: str) -> None:
    """Raises `BadInput` for a search without a hypernetwork: the dense engine was inside every budget already."""
    if not result.extra:
        raise BadInput(
            f"study {study}: nothing was searched, since the dense engine is inside the budget already; ask for more "
            "(--latency 2x)"
        )


def points(value: Mean) -> str:
    """A difference of accuracies in words: ``-0.40 points``, and where there is an interval what that says."""
    middle = f"{100 * value.value:+.2f} points"
    if value.half is None:
        return middle
    low, high = 100 * (value.value - value.half), 100 * (value.value + value.half)
    if low <= 0 <= high:
        said = f"no difference that {value.n} seeds can show"
    else:
        said = "better" if value.value > 0 else "worse"
    return f"{middle} (95 %: {low:+.2f} to {high:+.2f}; {said})"


def differences(rows: Sequence[Row], reference: str) -> list[str]:
    """A sentence per arm and budget: what it gains or loses against the reference."""
    found: list[Cell] = cells(rows, SPLIT, reference)
    sentences, several = [], len({row.seed for row in rows}) > 1
    for method in dict.fromkeys(row.method for row in rows):
        if method == reference:
            continue
        parts = []
        for budget in budgets(rows):
            own = [cell for cell in found if cell.method == method and cell.budget == budget]
            both = [*own, *(cell for cell in found if cell.method == reference and cell.budget == budget)]
            slow = ", ".join(f"{cell.over_budget} of {cell.method}" for cell in both if cell.over_budget)
            if own and own[0].difference is not None:
                alone = " (one seed)" if several and own[0].difference.n == 1 else ""
                slower = f" (engines over budget: {slow})" if slow else ""
                parts.append(f"{points(own[0].difference)} at {budget}{alone}{slower}")
            elif own:
                parts.append(f"at {budget} {_no_pair(own[0], both[len(own) :], reference)}")
        sentences.append(f"{method}, against {reference}: {'; '.join(parts) or 'nothing to compare'}.")
    if not several:
        sentences.append("One seed: a hint, no result; differences of half a point are noise.")
    return sentences


def _no_pair(own: Cell, references: Sequence[Cell], reference: str) -> str:
    """Why a budget has no difference: what became of the arm, or, where it has an accuracy, of the reference."""
    if own.accuracy is None:
        return outcomes(own)
    why = outcomes(references[0]) if references else "did not finish"
    return f"nothing to compare with ({reference}: {why})"


_STYLE = (
    "svg{font-family:system-ui,sans-serif;background:#fff}.t{font-size:12px;fill:#54606d}"
    ".strong{fill:#16202b;font-weight:650}.halo{paint-order:stroke;stroke:#fff;stroke-width:4px}"
    ".axis{stroke:#54606d}.grid{stroke:#edf0f3}.m.dense{fill:#8a95a3}.curve{stroke-width:1.8;fill:none}"
    ".c0.curve{stroke:#0b68c4}.c0.dot{fill:#0b68c4}.c3.curve{stroke:#8a95a3}.c3.dot{fill:#8a95a3}"
)


def standalone(figure: Markup) -> str:
    """A figure of the pages as a file of its own: with its colours, and a namespace."""
    start = re.match(r"<svg\b[^>]*>", str(figure))
    assert start is not None
    opening = start[0].replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    return f"{opening}<style>{_STYLE}</style>{str(figure)[start.end() :]}"


def _started(name: str, lab: Lab) -> str:
    """How to run a study again that was not started from the command line: the command, where one says it all."""
    config = lab.config
    flags = {
        "model": config.model,
        "data": config.data,
        "target": config.target,
        "to": lab.to,
        "seeds": ",".join(map(str, lab.seeds)),
        "latency": ",".join(config.latency),
        "epochs": f"{config.finetune_epochs():g}",
        "search-epochs": f"{config.search.epochs:g}",
    }
    plain = RunConfig()
    keys = (*flags.keys() & RunConfig.model_fields.keys(), "method", "seed")  # the last two are each run's own
    rest = {key: getattr(plain, key) for key in keys}
    rest["search"] = config.search.model_copy(update={"epochs": plain.search.epochs})
    if lab.model is not None or lab.data is not None or config.model_copy(update=rest) != plain:
        return f"Run from Python with the configuration in `{name}.json`."
    words = [word for flag, value in flags.items() if value is not None for word in (f"--{flag}", value)]
    return f"Run with `{shlex.join(['passdeploy', 'study', name, *words])}`."


def write(name: str, findings: Findings, lab: Lab) -> Path:
    """Writes ``NAME.md``, ``NAME.json`` and the figures into the study's folder; returns the page."""
    figures = dict(findings.figures)
    plot = tradeoff(findings.rows, SPLIT, findings.reference) if findings.rows else None
    if plot is not None:
        figures = {name: plot, **figures}
    for stem, figure in figures.items():
        write_atomic(lab.out / f"{stem}.svg", standalone(figure))
    parts = [
        f"# {name}: {findings.question}",
        "\n".join(f"- {sentence}" for sentence in findings.conclusion),
        f"Run with `{lab.command}`." if lab.command else _started(name, lab),
        *(f"![{stem}]({stem}.svg)" for stem in figures),
        *(f"## {title}\n\n{text}" for title, text in findings.sections),
    ]
    if findings.failed:
        parts.append(lost(findings.failed))
    if findings.rows:
        parts.append("## Results\n\n" + markdown(findings.rows, SPLIT, findings.reference))
    write_atomic(lab.out / f"{name}.md", "\n\n".join(parts).rstrip() + "\n")
    write_json(
        lab.out / f"{name}.json",
        {
            "schema": "passdeploy.study/1",
            "study": name,
            "question": findings.question,
            "conclusion": findings.conclusion,
            "config": lab.config.to_json(),
            "seeds": list(lab.seeds),
            "note": note(findings.rows, SPLIT) if findings.rows else "",
            "numbers": findings.numbers,
            "failed": findings.failed,
            "cells": [dataclasses.asdict(cell) for cell in cells(findings.rows, SPLIT, findings.reference)],
            "rows": [row.to_json() for row in findings.rows],
        },
    )
    return lab.out / f"{name}.md"
