"""Where results lie: `benchmarks/results/DEVICE`, a folder per device that something was measured on.

What was measured with the C library's memory in huge pages (docs/latency.md) has a folder of its own beside it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def folder_name(device: str) -> str:
    """``AMD EPYC (AVX-512)`` -> ``amd-epyc-avx-512``."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def device_folder(target: str = "cpu") -> Path:
    """benchmarks/results/DEVICE of a named target, under the settings of memory that this process has."""
    from passdeploy.targets import resolve

    huge = "glibc.malloc.hugetlb=1" in os.environ.get("GLIBC_TUNABLES", "")
    return RESULTS / folder_name(resolve(target).device + (" huge pages" if huge else ""))
