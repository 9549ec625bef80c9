"""Re-measures a finished run outside passdeploy: plain ONNX Runtime on `dense.onnx` and `model.onnx`.

    python benchmarks/remeasure.py runs/demo

One thread, spinning off, interleaved blocks of 20 ms (three calls at least), 40 pairs; the median ratio of five fresh
processes. Once as most people call a session, `session.run`, which adds some microseconds of Python and copies to both
networks alike, and once with inputs and outputs bound, which is the engine alone. Nothing of passdeploy is imported by
the processes that measure. Appends the row to `benchmarks/results/<device>/demo.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

from common import RESULTS, folder_name

MEASURE = """
import json, statistics, sys, time
import numpy as np, onnxruntime as ort
options = ort.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
options.add_session_config_entry("session.intra_op.allow_spinning", "0")
sessions = [ort.InferenceSession(path, options, providers=["CPUExecutionProvider"]) for path in sys.argv[1:3]]
shape = sessions[0].get_inputs()[0].shape
images = np.random.default_rng(0).random(shape, dtype=np.float32)
def bound(session):
    binding, image = session.io_binding(), ort.OrtValue.ortvalue_from_numpy(images)
    binding.bind_ortvalue_input("images", image)
    binding.bind_output(session.get_outputs()[0].name)
    session.run_with_iobinding(binding)
    binding.bind_ortvalue_output(session.get_outputs()[0].name, binding.get_outputs()[0])
    return lambda: (session.run_with_iobinding(binding), image)
def block(call, seconds):
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
calls = {"run": [lambda session=session: session.run(None, {"images": images}) for session in sessions],
         "bound": [bound(session) for session in sessions]}
found = {}
for way, (dense, model) in calls.items():
    for call in (dense, model):
        block(call, 0.5)
    pairs = [(block(dense, 0.02), block(model, 0.02)) for _ in range(40)]
    found[way] = {"ratio": statistics.median(a / b for a, b in pairs),
                  "dense_ms": 1e3 * statistics.median(a for a, _ in pairs),
                  "model_ms": 1e3 * statistics.median(b for _, b in pairs)}
print(json.dumps(found))
"""


def once(dense: Path, model: Path, **variables: str) -> dict[str, dict[str, float]]:
    """What one fresh process measures, with these variables in its environment: by ``run`` and ``bound``."""
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, "-c", MEASURE, str(dense), str(model)]
    found = subprocess.run(command, check=True, capture_output=True, env=environment).stdout
    return json.loads(found)  # type: ignore[no-any-return]


def measure(dense: Path, model: Path, processes: int = 5) -> dict[str, object]:
    """Medians over fresh processes: called by `session.run`, and (under "bound") the engine alone."""
    rows = [once(dense, model) for _ in range(processes)]
    ways = {
        way: {
            "ratio": statistics.median(row[way]["ratio"] for row in rows),
            "ratios": [round(row[way]["ratio"], 4) for row in rows],
            "dense_ms": statistics.median(row[way]["dense_ms"] for row in rows),
            "model_ms": statistics.median(row[way]["model_ms"] for row in rows),
        }
        for way in ("run", "bound")
    }
    return {**ways["run"], "bound": ways["bound"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--device", help="name of the results folder; default: from the report")
    args = parser.parse_args()
    report = json.loads((args.run / "report.json").read_text())
    outside = measure(args.run / "dense.onnx", args.run / "model.onnx")
    device = args.device or folder_name(report["target"]["device"])
    row = {
        "measured": time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime()),
        "device": f"{report['target']['device']}, {os.cpu_count()} cores, {platform.machine()}",
        "model": report["provenance"]["model"],
        "data": report["provenance"]["data"],
        "asked": report["budget"]["asked"],
        "status": report["status"],
        "speedup_report": report["speedup"],
        "speedup_outside": outside,
        "accuracy_test": {"dense": report["dense"]["accuracy"], "pruned": report["pruned"]["accuracy"]},
        "macs": {"dense": report["dense"]["macs"], "pruned": report["pruned"]["macs"]},
        "equivalence": report["equivalence"],
        "alternatives": report.get("alternatives"),
        "predictor": report["predictor"],
        "timing_s": report["timing_s"],
        "versions": report["environment"]["versions"],
    }
    path = RESULTS / device / "demo.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = json.loads(path.read_text()) if path.exists() else []
    path.write_text(json.dumps([*rows, row], indent=1) + "\n")
    print(json.dumps({"outside": outside, "report": report["speedup"], "status": report["status"]}, indent=1))
    print(f"appended to {path}")


if __name__ == "__main__":
    main()
