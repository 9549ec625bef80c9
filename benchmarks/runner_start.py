"""How long the runner takes to start, over the import of its backend alone: fresh processes, taking turns.

    python benchmarks/runner_start.py runs/demo/bundle [ANOTHER/bundle ...]

Starting is everything until a bundle can be asked: imports, digests of all its files, the engine loaded, its sample
outputs reproduced. One row per bundle goes into benchmarks/results/DEVICE/runner_start.json. Exit 1 where a start takes
more than the goal.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import RESULTS, folder_name

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

GOAL_S = 0.5
MODULES = {"tensorrt": "tensorrt, cuda.bindings.runtime", "tensorrt_rtx": "tensorrt_rtx, cuda.bindings.runtime"}
ALONE = "import numpy, {backend}"
RUNNER = "import sys; from passdeploy.shipping.runner import load; load(sys.argv[1]).close()"
CHECK = RUNNER + "; print(sorted({'torch', 'pandas', 'pydantic', 'onnx'} & set(sys.modules)))"


def seconds(program: str, bundle: Path) -> float:
    """Of a process, from start to end."""
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", program, str(bundle)], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


def row(bundle: Path, repeats: int) -> dict[str, Any]:
    """One bundle's start."""
    import numpy as np

    from passdeploy.latency.stats import median_ranks
    from passdeploy.shipping.contents import open_bundle

    contents = open_bundle(bundle)
    engine = contents.choose()
    alone, runner = ALONE.format(backend=MODULES.get(engine.backend, engine.backend)), RUNNER
    times: dict[str, list[float]] = {alone: [], runner: []}
    for program in times:
        seconds(program, bundle)  # files into the page cache, byte code onto the disk
    for _ in range(repeats):
        for program, taken in times.items():
            taken.append(seconds(program, bundle))
    over = sorted(b - a for a, b in zip(times[alone], times[runner], strict=True))
    ranks = median_ranks(len(over), 0.95)
    found = subprocess.run([sys.executable, "-c", CHECK, str(bundle)], cwd=ROOT, capture_output=True, text=True)
    return {
        "bundle": contents.manifest["name"],
        "bytes": sum(file.stat().st_size for file in bundle.rglob("*") if file.is_file()),
        "backend": engine.backend,
        "backend_import_s": round(float(np.median(times[alone])), 3),
        "runner_s": round(float(np.median(times[runner])), 3),
        "over_the_import_s": round(float(np.median(over)), 3),
        "ci95": [round(over[rank], 3) for rank in ranks] if ranks else None,
        "repeats": repeats,
        "heavy_modules": found.stdout.strip(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/DEVICE/runner_start.json")
    options = parser.parse_args()

    from passdeploy.targets import cpu_name

    rows = [row(bundle.resolve(), options.repeats) for bundle in options.bundles]
    told = {"device": cpu_name(), "goal_s": GOAL_S, "rows": rows}
    out = options.out or RESULTS / folder_name(cpu_name()) / "runner_start.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(told, indent=1) + "\n")
    print(json.dumps(told, indent=1))
    return int(any(each["over_the_import_s"] > GOAL_S for each in rows))


if __name__ == "__main__":
    sys.exit(main())
