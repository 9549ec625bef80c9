"""Everything that can only be measured on an NVIDIA GPU: one command, resumable, every section optional.

    python benchmarks/gpu.py                         all sections
    python benchmarks/gpu.py kernels budgets         only these
    python benchmarks/gpu.py --quick                 minutes instead of hours: for CI and a first look
    python benchmarks/gpu.py --data cifar10          adds PASS against baselines

Sections: rtx (does TensorRT-RTX run on this GPU), kernels (against copy bandwidth, eager, torch.compile), budgets
(passdeploy run at 1.5x, 2x, 3x), search (a search step with the kernels), engines (every backend that is here) and
baselines. Rows go to benchmarks/results/DEVICE/ (DEVICE-quick/), whole runs to --runs; started again it does what is
missing, with --retry also what failed. Exit 0 everything was tried, 2 no GPU here, or rows of
another driver or library lie there.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("KMP_BLOCKTIME", "0")

from benchmarks.gpu_sections.base import Bench, folder_name  # noqa: E402
from benchmarks.gpu_sections.summary import render  # noqa: E402
from passdeploy.errors import BadInput  # noqa: E402

SECTIONS = ("rtx", "kernels", "budgets", "search", "engines", "baselines")


def unavailable() -> str | None:
    """Why nothing can be measured here; None when it can."""
    import torch

    if torch.cuda.is_available():
        return None
    return "no NVIDIA GPU, or a PyTorch without CUDA; run it on a machine with a GPU (Dockerfile.gpu)"


def other_software(folder: Path, facts: dict[str, Any]) -> str | None:
    """What the rows in a folder were measured with, where that is another version of what is here now.

    A library that is new here is none: what was left out for want of it is done now.
    """
    if not (folder / "machine.json").exists() or not list(folder.glob("*.jsonl")):
        return None
    before = json.loads((folder / "machine.json").read_text())
    were, are = ({"driver": f["driver"], "CUDA": f["cuda"], **f["versions"]} for f in (before, facts))
    changed = [f"{name} {were[name]}" for name in were.keys() & are.keys() if were[name] != are[name]]
    return ", ".join(sorted(changed)) or None


def open_bench(options: argparse.Namespace) -> Bench:
    """Names the device, and writes what its rows hold for."""
    import torch

    from passdeploy.environment import environment
    from passdeploy.targets import ANY_GPU, DEVICES, attached_device

    device = torch.cuda.get_device_name()
    capability = "{}.{}".format(*torch.cuda.get_device_capability())
    target = next((name for name, d in DEVICES.items() if d.compute_capability and attached_device(d)), ANY_GPU)
    # Quick rows are shorter measurements: a full run must not take them for its own.
    folder = options.out / (folder_name(device) + ("-quick" if options.quick else ""))
    folder.mkdir(parents=True, exist_ok=True)
    found = environment()
    facts = {"device": device, "compute_capability": capability, "driver": found["driver"], "quick": options.quick}
    facts |= {"cuda": torch.version.cuda, "versions": found["versions"], "settings": found["settings"]}
    if changed := other_software(folder, facts):
        raise BadInput(
            f"{folder} holds rows of {changed}, which would stand under today's name and are not taken again: give "
            "another --out and --runs, or move them away"
        )
    (folder / "machine.json").write_text(json.dumps(facts, indent=1) + "\n")
    runs = options.runs / folder.name
    return Bench(device, capability, target, folder, runs.resolve(), options.quick, options.data, options.retry)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"default: all of {', '.join(SECTIONS)}")
    parser.add_argument("--quick", action="store_true", help="few cases, few rounds")
    parser.add_argument("--data", help="what accuracies are measured on (cifar10, an image folder); default: generated")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "gpu", help="whole runs, reports and bundles")
    parser.add_argument("--retry", action="store_true", help="does again what failed")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.sections) - set(SECTIONS))
    if unknown:
        print(f"benchmarks/gpu.py: no section {', '.join(unknown)}; known: {', '.join(SECTIONS)}", file=sys.stderr)
        return 2
    reason = unavailable()
    if reason is not None:
        print(f"benchmarks/gpu.py: {reason}", file=sys.stderr)
        return 2
    try:
        bench = open_bench(options)
    except BadInput as error:
        print(f"benchmarks/gpu.py: {error}", file=sys.stderr)
        return 2
    for name in options.sections or SECTIONS:
        bench.say(f"== {name}")
        try:
            importlib.import_module(f"benchmarks.gpu_sections.{name}").run(bench)
        except Exception as error:  # a section that can't even start must not keep the others from running
            bench.say(f"{name}: {type(error).__name__}: {error}")
        (bench.folder / "summary.md").write_text(render(bench))
    print(bench.folder / "summary.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
