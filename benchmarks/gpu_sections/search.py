"""What a search step costs with the masked kernels, over a plain training step: benchmarks/search_cost.py on CUDA."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.gpu_sections.base import Bench, Row
from benchmarks.gpu_sections.budgets import PICTURES, ROOT, environment

SCRIPT = Path(__file__).parents[1] / "search_cost.py"


def cost(model: str, batch: int, pairs: int, kernels: bool) -> Row:
    """Interleaved turns of both loops in one process."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "cost.json")
        words = [sys.executable, str(SCRIPT), "--model", model, "--data", PICTURES, "--batch", str(batch)]
        switch = {"PASSDEPLOY_KERNELS": "1" if kernels else "0"}
        done = subprocess.run(
            [*words, "--pairs", str(pairs), "--out", str(out)], cwd=ROOT, env=environment() | switch,
            capture_output=True, text=True,
        )  # fmt: skip
        if not out.exists():
            raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "it said nothing")
        refused = [line for line in done.stderr.splitlines() if "does without its CUDA kernel" in line]
        if kernels and refused:  # what was timed is not what the row says
            raise RuntimeError(refused[0])
        found = json.loads(out.read_text())
    return {name: found[name] for name in ("step_ratio", "search_step_s", "plain_step_s")} | {"kernels": kernels}


def run(bench: Bench) -> None:
    """ResNet-18 and ResNet-50 at 224 pixels, with the kernels and without."""
    models, pairs = (("resnet18",), 6) if bench.quick else (("resnet18", "resnet50"), 15)
    for model in models:
        for kernels in (True, False):
            key = f"{model} batch 64 {'masked kernels' if kernels else 'scaled weights'}"
            bench.case("search", key, lambda m=model, k=kernels: cost(m, 64, pairs, k))  # type: ignore[misc]
