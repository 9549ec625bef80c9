"""The report's figures as inline SVG. Colours come from the page's CSS, so that light, dark and print all work."""

from __future__ import annotations

from passdeploy.reporting.plots.curves import curve_panels
from passdeploy.reporting.plots.distribution import distribution
from passdeploy.reporting.plots.loop import closed_loop
from passdeploy.reporting.plots.plane import comparison_plane, over_latency, plane
from passdeploy.reporting.plots.skyline import skyline
from passdeploy.reporting.plots.svg import pair_bar, share_bar, stage_bar
from passdeploy.reporting.plots.trend import trend

__all__ = [
    "closed_loop",
    "comparison_plane",
    "curve_panels",
    "distribution",
    "over_latency",
    "pair_bar",
    "plane",
    "share_bar",
    "skyline",
    "stage_bar",
    "trend",
]
