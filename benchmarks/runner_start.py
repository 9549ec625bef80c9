"""How long the runner takes to start, over the import of its backend alone: fresh processes, taking turns.

    python benchmarks/runner_start.py runs/demo/bundle

Writes benchmarks/results/DEVICE/runner_start.json.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

ALONE = "import numpy, {backend}"
RUNNER = "import sys; from passdeploy.shipping.runner import load; load(sys.argv[1]).close()"
CHECK = RUNNER + "; print(sorted({'torch', 'pandas', 'pydantic'} & set(sys.modules)))"


def seconds(program: str, bundle: Path) -> float:
    """Of a process, from start to end."""
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", program, str(bundle)], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--repeats", type=int, default=11)
    options = parser.parse_args()

    from passdeploy.shipping.contents import open_bundle
    from passdeploy.targets import cpu_name

    bundle = options.bundle.resolve()
    engine = open_bundle(bundle).choose()
    alone, runner = ALONE.format(backend=engine.backend), RUNNER
    times: dict[str, list[float]] = {alone: [], runner: []}
    for _ in range(options.repeats):
        for program, taken in times.items():
            taken.append(seconds(program, bundle))
    pairs = [b - a for a, b in zip(times[alone], times[runner], strict=True)]
    found = subprocess.run([sys.executable, "-c", CHECK, str(bundle)], cwd=ROOT, capture_output=True, text=True)
    told = {
        "device": cpu_name(),
        "bundle": open_bundle(bundle).manifest["name"],
        "backend": engine.backend,
        "backend_import_s": round(statistics.median(times[alone]), 3),
        "runner_s": round(statistics.median(times[runner]), 3),
        "over_the_import_s": round(statistics.median(pairs), 3),
        "repeats": options.repeats,
        "heavy_modules": found.stdout.strip(),
    }
    device = re.sub(r"[^a-z0-9]+", "-", cpu_name().lower()).strip("-")
    out = ROOT / "benchmarks" / "results" / device / "runner_start.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(told, indent=1) + "\n")
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
