"""PASS against the best three baselines on this GPU: `passdeploy compare`, same budgets, seeds and training steps.

Only on real data: give --data NAME (cifar10, fashion-mnist, an image folder). On generated pictures accuracies would
say nothing, so nothing is run.
"""

from __future__ import annotations

import json
import subprocess
import sys

from benchmarks.gpu_sections.base import Bench, Row
from benchmarks.gpu_sections.budgets import ROOT, environment

METHODS = "pass,mdp,taylor,l1"


def compare(bench: Bench) -> Row:
    """One comparison at 2x and 3x over the seeds."""
    out = bench.runs / "baselines"
    words = [sys.executable, "-m", "passdeploy", "compare", "--methods", METHODS, "--latency", "2x,3x"]
    words += ["--seeds", "0" if bench.quick else "0,1,2", "--model", "resnet20", "--data", str(bench.data)]
    words += ["--target", bench.target, "--out", str(out), "--json"]
    done = subprocess.run(words, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True)
    if not done.stdout.strip():
        raise RuntimeError(f"passdeploy compare ended with status {done.returncode}; see its output")
    found = json.loads(done.stdout)
    return {"data": bench.data, "methods": METHODS, "rows": found["rows"], "failed": found["failed"]}


def run(bench: Bench) -> None:
    """Nothing without real data."""
    if bench.data is None:
        bench.say("baselines: left out; they want --data NAME")
        return
    bench.case("baselines", f"resnet20 {bench.data}", lambda: compare(bench))
