"""The report as one self-contained HTML file: inline SVG and CSS, no scripts, nothing loaded from elsewhere."""

from __future__ import annotations

from functools import cache

import jinja2

from passdeploy.reporting import format as f
from passdeploy.reporting import verdict as v
from passdeploy.reporting.schema import Report


@cache
def environment() -> jinja2.Environment:
    """Templates of this package; everything is escaped unless it is marked as safe by the plots."""
    result = jinja2.Environment(
        loader=jinja2.PackageLoader("passdeploy.reporting", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    result.globals.update(f=f, v=v)
    return result


def render_html(report: Report) -> str:
    """The whole page; everything in it comes from `report`."""
    return environment().get_template("report.html.j2").render(report=report)
