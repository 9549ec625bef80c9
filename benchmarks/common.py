"""Where results lie: `benchmarks/results/DEVICE`, a folder per device that something was measured on.

What was measured on a CPU with weights in huge pages (docs/latency.md) has a folder of its own beside it.
"""

from __future__ import annotations

import re
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def folder_name(device: str) -> str:
    """``AMD EPYC (AVX-512)`` -> ``amd-epyc-avx-512``."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def device_folder(target: str = "cpu") -> Path:
    """benchmarks/results/DEVICE of a named target, as this process has its memory."""
    from passdeploy import huge_pages
    from passdeploy.targets import resolve

    found = resolve(target)
    huge = found.compute_capability is None and huge_pages.used()
    return RESULTS / folder_name(found.device + " huge pages" * huge)
