"""`passdeploy study`: from what was typed to the page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from passdeploy.compare.command import check_budgets, parse_seeds
from passdeploy.config import RunConfig
from passdeploy.console import Ui
from passdeploy.study.base import Findings, Lab, get_study, write

if TYPE_CHECKING:
    from passdeploy.data.base import ImageData
    from passdeploy.subject import Model

SMALL: dict[str, Any] = {"latency": "2x,3x", "epochs": 1.0, "search": {"epochs": 0.5}}
"""Scale of a study when nothing else is said: minutes per arm on a few cores."""


def study(
    name: str,
    config: RunConfig,
    seeds: str,
    out: Path,
    *,
    to: str | None = None,
    ui: Ui | None = None,
    model: Model | None = None,
    data: ImageData | None = None,
    command: str | None = None,
) -> tuple[Findings, Path]:
    """Runs a study and writes its page, which says what could not finish.

    Args:
        name: Of the study.
        config: What all its runs share.
        seeds: Separated by commas.
        out: Its folder.
        to: A second data set, for studies that need one.
        ui: Shows progress.
        model: A factory or a network instead of the configuration's.
        data: A data set instead of the configuration's.
        command: As typed, for the page.

    Returns:
        What was found, and the page.

    Raises:
        BadInput: Something can't be used; one line says what.
    """
    body = get_study(name)
    check_budgets(config, "study")
    lab = Lab(config, parse_seeds(seeds), out, ui or Ui(quiet=True), model, data, to, command)
    findings = body(lab)
    findings.failed = lab.failed
    return findings, write(name, findings, lab)
