"""Writes the README's table of the demo from the newest row of `benchmarks/results/<device>/demo.json`.

python benchmarks/readme.py benchmarks/results/amd-epyc-avx-512/demo.json
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

README = Path(__file__).parents[1] / "README.md"


def table(row: dict[str, Any], source: str) -> str:
    """A sentence on the device, and the numbers."""
    report, outside, accuracy = row["speedup_report"], row["speedup_outside"], row["accuracy_test"]
    bound = outside["bound"]
    low, high = report["latency_ci95"]
    proof = max(row["equivalence"][key] for key in ("masked_vs_thin", "thin_vs_onnx", "onnx_vs_engine"))
    minutes = sum(row["timing_s"].values()) / 60
    lines = [
        f"ResNet-20 on Fashion-MNIST, {row['device']}, ONNX Runtime {row['versions']['onnxruntime']}, batch 1, "
        f"one thread, fp32 ([raw]({source})):",
        "",
        "| | dense | pruned | |",
        "|---|---|---|---|",
        f"| latency, p50, re-measured outside passdeploy | {bound['dense_ms']:.3f} ms | {bound['model_ms']:.3f} ms "
        f"| **{bound['ratio']:.2f}x** (asked: {row['asked']}) |",
        f"| the same, called by Python's `session.run` | {outside['dense_ms']:.3f} ms "
        f"| {outside['model_ms']:.3f} ms | {outside['ratio']:.2f}x |",
        f"| in the report | | | {report['latency']:.2f}x ({low:.2f} to {high:.2f}) |",
        f"| accuracy, 10,000 test images | {100 * accuracy['dense']:.2f} % | {100 * accuracy['pruned']:.2f} % "
        f"| {100 * (accuracy['pruned'] - accuracy['dense']):+.2f} points |",
        f"| multiply-adds | {row['macs']['dense'] / 1e6:.1f} M | {row['macs']['pruned'] / 1e6:.1f} M "
        f"| {row['macs']['dense'] / row['macs']['pruned']:.2f}x fewer |",
        *_alternatives(row),
        f"| largest difference of any step from the one before | | | {proof:.0e} of the largest output |",
        f"| the run took | | | {minutes:.1f} minutes |",
    ]
    return "\n".join(lines)


def _alternatives(row: dict[str, Any]) -> list[str]:
    """What the dense network would do in a lower precision, as the report has it."""
    options = (row.get("alternatives") or {}).get("precisions", [])
    return [
        f"| for comparison: dense {option['precision']}, not pruned | | {option['latency_ms']['p50']:.3f} ms "
        f"| {option['speedup']:.2f}x at {100 * option['accuracy']:.2f} % |"
        for option in options
        if option["speedup"] is not None
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    args = parser.parse_args()
    row = json.loads(args.results.read_text())[-1]
    source = args.results.resolve().relative_to(README.parent).as_posix()
    text = README.read_text()
    new = f"<!-- demo:begin -->\n{table(row, source)}\n<!-- demo:end -->"
    README.write_text(re.sub(r"<!-- demo:begin -->.*<!-- demo:end -->", lambda _: new, text, flags=re.DOTALL))


if __name__ == "__main__":
    main()
