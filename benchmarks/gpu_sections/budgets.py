"""`passdeploy run` on ResNet-18 and ResNet-50, fp16, batch 64: is the measured engine inside 1.5x, 2x and 3x?

The runs lie outside the results (bundles are large); their report.json files are copied. The latency model's error is
in every report, so prediction on this GPU is told by the same rows.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu_sections.base import Bench, Row

ROOT = Path(__file__).resolve().parents[2]
MODELS = ("resnet18", "resnet50")
BUDGETS = ("1.5x", "2x", "3x")
PICTURES = "benchmarks.gpu_sections.pictures:load"


def environment() -> dict[str, str]:
    """For child processes: this very passdeploy, and the benchmarks beside it."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path}


def command(bench: Bench, model: str, budgets: tuple[str, ...], out: Path) -> list[str]:
    """The command line of one run."""
    words = [sys.executable, "-m", "passdeploy", "run", "--model", model, "--data", bench.data or PICTURES]
    words += ["--target", bench.target, "--precision", "fp16", "--batch", "64", "--latency", ",".join(budgets)]
    return [*words, "--epochs", "1" if bench.quick else "2", "--out", str(out)]


def folder_of(out: Path, budgets: tuple[str, ...], asked: str) -> Path:
    """Where a budget's final copies lie: several budgets have a folder each."""
    return out / asked if len(budgets) > 1 else out


def row_of(report: dict[str, object]) -> Row:
    """What stays of a report in the table."""
    speedup, predictor = report["speedup"], report["predictor"]
    assert isinstance(speedup, dict) and isinstance(predictor, dict)
    found = [
        abs(c["predicted_ratio"] / c["measured_ratio"] - 1)
        for c in report.get("candidates") or []  # type: ignore[attr-defined]
        if c["measured_ratio"]
    ]
    low, high = speedup["latency_ci95"] or (None, None)
    return {
        "status": report["status"],
        "speedup": {"value": speedup["latency"], "low": low, "high": high} if speedup["latency"] else None,
        "macs": speedup["macs"],
        "realisation": speedup["realisation"],
        "dense_ms": (report["dense"]["latency_ms"] or {}).get("p50"),  # type: ignore[index]
        "pruned_ms": ((report["pruned"] or {}).get("latency_ms") or {}).get("p50"),  # type: ignore[attr-defined]
        "prediction_mape": predictor["mape"],
        "prediction_of_candidates": max(found, default=None),
        "builds_apart": (report.get("rebuilds") or {}).get("spread"),  # type: ignore[attr-defined]
        "backend": report["target"]["backend"],  # type: ignore[index]
    }


def run(bench: Bench) -> None:
    """One run per network; an interrupted one goes on where it was."""
    models, budgets = (("resnet18",), ("2x",)) if bench.quick else (MODELS, BUDGETS)
    for model in models:
        out = bench.runs / f"{model}-fp16-b64"
        keys = {f"{model} fp16 batch 64 {asked}": asked for asked in budgets}
        if set(keys) <= {row["key"] for row in bench.rows("budgets") if not (bench.retry and "error" in row)}:
            continue
        done = subprocess.run(command(bench, model, budgets, out), cwd=ROOT, env=environment(), text=True)
        for key, asked in keys.items():
            path = folder_of(out, budgets, asked) / "report.json"
            kept = bench.folder / "reports" / f"{model}-{asked}.json"
            bench.case("budgets", key, lambda p=path, k=kept, code=done.returncode: _take(p, k, code))  # type: ignore[misc]


def _take(path: Path, kept: Path, status: int) -> Row:
    if not path.exists():
        raise RuntimeError(f"passdeploy run ended with status {status} and no report; see its output")
    kept.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, kept)
    return row_of(json.loads(path.read_text()))
