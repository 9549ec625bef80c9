"""The CUDA kernels against the copy-bandwidth floor, eager PyTorch and torch.compile: benchmarks/kernels.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.gpu_sections.base import Bench
from benchmarks.gpu_sections.budgets import environment

SCRIPT = Path(__file__).parents[1] / "kernels.py"
AGAIN = 3
"""With which it ends where a case has taken the GPU's context down and others were not tried yet."""


def run(bench: Bench) -> None:
    """In a process of its own, which goes on where it stopped; in another one after a case that spoilt it."""
    command = [sys.executable, str(SCRIPT), "--out", str(bench.folder / "kernels.json")]
    while True:
        done = subprocess.run([*command, *(["--quick"] if bench.quick else [])], env=environment())
        if done.returncode != 0:
            bench.say(f"kernels: benchmarks/kernels.py ended with status {done.returncode}")
        if done.returncode != AGAIN:
            return
