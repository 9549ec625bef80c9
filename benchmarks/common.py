"""Where results lie: `benchmarks/results/DEVICE`, a folder per device that something was measured on."""

from __future__ import annotations

import re
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def folder_name(device: str) -> str:
    """``AMD EPYC (AVX-512)`` -> ``amd-epyc-avx-512``."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def device_folder(target: str = "cpu") -> Path:
    """benchmarks/results/DEVICE of a named target."""
    from passdeploy.targets import resolve

    return RESULTS / folder_name(resolve(target).device)
