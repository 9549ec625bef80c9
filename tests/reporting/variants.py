"""The example report in each of the six statuses, and a few runs side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from passdeploy.reporting.files import parse_report
from passdeploy.reporting.schema import Report

FILE = Path(__file__).with_name("example.json")
STATUSES = ("within_budget", "over_budget", "infeasible", "unverified", "not_equivalent", "accuracy_below_floor")


def data() -> dict[str, Any]:
    return json.loads(FILE.read_text())


def variant(status: str) -> Report:
    """The example as it would look with another outcome."""
    d = data()
    d["status"] = status
    if status == "over_budget":
        d["budget"]["latency_ms"] = 0.25
        d["budget"]["asked"] = "250us"
    elif status == "infeasible":
        d["budget"] = {"asked": "12x", "latency_ms": 0.0484, "percentile": "p50", "scope": "engine"}
        d["pruned"] = d["dense"]["latency_ms"] = None
        d["predicted"] = {"dense_ms": 0.5814, "pruned_ms": None, "speedup": None}
        d["speedup"] = {"latency": None, "latency_ci95": None, "macs": None, "realisation": None}
        d["reachable"] = {"latency_ms": 0.091, "speedup": 6.4, "measured": True}
        for key in ("distribution", "prompt", "groups", "accuracy_points", "health", "why_not_faster", "budgets"):
            del d[key]
        d["curves"]["finetune"] = None
        proof = dict.fromkeys(d["equivalence"], None)
        d["equivalence"] = proof
    elif status == "unverified":
        d["target"] = {
            "name": "a100",
            "device": "NVIDIA A100",
            "compute_capability": "8.0",
            "backend": "tensorrt_rtx",
            "precision": "fp16",
            "batch": 1,
            "threads": 1,
            "attached": False,
        }
        d["budget"] = {"asked": "2x", "latency_ms": 0.061, "percentile": "p50", "scope": "engine"}
        d["dense"]["latency_ms"] = d["pruned"]["latency_ms"] = None
        d["speedup"].update(latency=None, latency_ci95=None, realisation=None)
        d["predictor"] = {"kind": "analytic", "mape": None, "max_ape": None, "n": 0, "repeatability": None}
        d["predicted"] = {"dense_ms": 0.122, "pruned_ms": 0.0589, "speedup": 2.07}
        d["equivalence"].update(onnx_vs_engine=None, thin_vs_onnx=6.1e-6, tolerance=1e-2)
        for point in d["accuracy_points"]:
            point["latency_ms"] = None
        d["alternatives"]["dense_latency_ms"] = None
        for option in d["alternatives"]["precisions"]:
            option.update(latency_ms=None, speedup=None, speedup_ci95=None, meets_budget=None)
        for key in ("distribution", "candidates", "budgets", "why_not_faster"):
            del d[key]
        d["messages"].append("The analytic roofline says 2.07x; measure it with: passdeploy verify bundle --measure")
        d["environment"]["versions"]["tensorrt_rtx"] = "1.7.1.116"
    elif status == "not_equivalent":
        d["equivalence"].update(thin_vs_onnx=0.0313, onnx_vs_engine=None, top1_agreement=0.931)
    elif status == "accuracy_below_floor":
        d["budget"].update(min_accuracy=0.93, judged_accuracy=0.9281)
    return parse_report(d)


def runs() -> list[Report]:
    """Three budgets of two methods."""
    rows = [
        ("pass", "1.5x", 0.9318, 1.534, "within_budget"),
        ("pass", "2x", 0.9272, 2.068, "within_budget"),
        ("pass", "3x", 0.9139, 3.071, "within_budget"),
        ("l1", "2x", 0.9188, 2.031, "within_budget"),
        ("l1", "3x", 0.8981, 2.912, "over_budget"),
    ]
    reports = []
    for index, (method, asked, accuracy, speedup, status) in enumerate(rows):
        d = data()
        d.update(method=method, status=status)
        d["budget"].update(asked=asked, latency_ms=0.5814 / float(asked[:-1]))
        factor = 0.2811 / (0.5814 / speedup)
        for key in ("p50", "p90", "p99", "mean"):
            d["pruned"]["latency_ms"][key] /= factor
        d["pruned"]["accuracy"] = accuracy
        d["speedup"].update(latency=speedup, latency_ci95=[speedup - 0.02, speedup + 0.02])
        d["provenance"].update(created=f"2026-11-{17 + index}T10:42:07+00:00", commit=f"{index}f1c2ab")
        reports.append(parse_report(d))
    return reports
