"""Reports of a run: JSON (the contract), Markdown and HTML, exporters for CI, and history over many runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from passdeploy.reporting.files import load_report as load_report
    from passdeploy.reporting.files import write_reports as write_reports
    from passdeploy.reporting.schema import Report as Report

_HOME = {"load_report": "files", "write_reports": "files", "Report": "schema"}


def __getattr__(name: str) -> Any:
    """Imports pydantic and jinja2 only when something is used."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"passdeploy.reporting.{_HOME[name]}"), name)
