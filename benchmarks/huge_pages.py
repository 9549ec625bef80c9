"""What it changes that weights lie in huge pages: plain ONNX Runtime on `dense.onnx` and `model.onnx` of finished runs.

    python benchmarks/huge_pages.py runs/budgets/vgg16_bn-64/2x runs/budgets/resnet18-64/3x
    python benchmarks/huge_pages.py --table

Fresh processes take turns, without and with `GLIBC_TUNABLES=glibc.malloc.hugetlb=1` (benchmarks/remeasure.py says what
each of them does). Linux has to hand huge pages to whoever asks, and to nobody else (`madvise`). Writes
`benchmarks/results/<device>/huge-pages.json`, a row per run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

from common import RESULTS, folder_name
from remeasure import once

from passdeploy import huge_pages
from passdeploy.targets import cpu_name

SETTINGS = {"small": "glibc.malloc.hugetlb=0", "huge": huge_pages.VALUE}
PROCESSES = 9


def evaluate(run: Path) -> dict[str, Any]:
    report = json.loads((run / "report.json").read_text())
    dense = next(path for path in (run / "dense.onnx", run.parent / "dense.onnx") if path.exists())
    found: dict[str, list[dict[str, float]]] = {name: [] for name in SETTINGS}
    for _ in range(PROCESSES):
        for name, tunables in SETTINGS.items():
            found[name].append(once(dense, run / "model.onnx", **{huge_pages.VARIABLE: tunables})["bound"])
    sizes = {name: path.stat().st_size for name, path in (("dense", dense), ("model", run / "model.onnx"))}
    return {
        "model": report["provenance"]["model"],
        "asked": report["budget"]["asked"], "bytes": sizes, **found, "versions": report["environment"]["versions"],
        "measured": time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime()), "load": os.getloadavg()[0],
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Medians over processes, and from the lowest to the highest of the ratios."""
    lines = [
        "| network | pages | dense | pruned | times as fast | in single processes |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        for name in SETTINGS:
            dense, model = (statistics.median(one[key] for one in row[name]) for key in ("dense_ms", "model_ms"))
            ratios = sorted(one["ratio"] for one in row[name])
            sizes = f"{row['bytes']['dense'] / 1e6:.0f} MB, {row['bytes']['model'] / 1e6:.0f} MB"
            lines.append(
                f"| {row['model']}, {row['asked']} ({sizes}) | {name} | {dense:.2f} ms | {model:.2f} ms "
                f"| {statistics.median(ratios):.2f}x | {ratios[0]:.2f}x to {ratios[-1]:.2f}x |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="*", help="run directories")
    parser.add_argument("--table", action="store_true", help="of what is there")
    args = parser.parse_args()
    path = RESULTS / folder_name(cpu_name()) / "huge-pages.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    if args.runs and huge_pages.mode() != "madvise":
        parser.error(f"huge pages go to whoever asks where the mode is madvise, here it is {huge_pages.mode()}")
    for run in args.runs:
        row = evaluate(run)
        rows = [r for r in rows if (r["model"], r["bytes"]) != (row["model"], row["bytes"])] + [row]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
