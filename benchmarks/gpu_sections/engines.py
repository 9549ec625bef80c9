"""Every engine backend that is here: dense against all widths halved, interleaved, over batches and precisions.

Each case has a process of its own: a library that takes its process down, or an error that leaves the GPU's context
useless for whatever comes next, costs one row.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_sections.base import Bench, Row, failure
from benchmarks.gpu_sections.budgets import ROOT, environment

MODELS = ("resnet18", "resnet50", "vgg16")
BATCHES = (1, 8, 64)
PRECISIONS = ("fp16", "fp32", "int8")
SIZE = (224, 224)


def network(name: str, size: tuple[int, int]) -> tuple[Any, Any, Any, Any]:
    """(model behind its normalisation, groups, operators, half-width structure) with random weights."""
    from passdeploy.data.base import Preprocess
    from passdeploy.groups import find_groups, operators
    from passdeploy.models import build
    from passdeploy.search.prompt import InputStage, Prompted
    from passdeploy.structure import Structure

    torch.manual_seed(0)
    net = build(name, 1000).eval()
    example = torch.randn(1, 3, *size)
    groups = find_groups(net, example)
    masks = {}
    for group in groups.groups:
        kept = group.units if group.kind == "depth" else min(group.units, max(8, group.units // 2 // 8 * 8))
        masks[group.name] = tuple(index < kept for index in range(group.units))
    ops = operators(net, example, groups)
    return Prompted(InputStage(Preprocess(size=size)), net), groups, ops, Structure(masks)


def compare(bench: Bench, name: str, backend: str, precision: str, batch: int, size: tuple[int, int] = SIZE) -> Row:
    """Dense and half as wide, side by side, and the host's time to enqueue the dense one."""
    from passdeploy.engines.base import get_backend
    from passdeploy.export import OnnxSlicer
    from passdeploy.groups import macs
    from passdeploy.latency.measure import BENCH, QUICK
    from passdeploy.meter import Meter
    from passdeploy.targets import Target

    target = Target(bench.target, bench.device, bench.capability, backend, precision, batch, 1, True)
    made = get_backend(backend)
    if reason := made.available(target) or made.runnable(target):
        return {"skipped": reason}
    model, groups, ops, structure = network(name, size)
    images = np.random.default_rng(0).random((max(batch, 8), 3, *size), dtype=np.float32)
    slicer = OnnxSlicer(model, groups, (3, *size), batch)
    with Meter(slicer, groups, target, images) as meter:
        comparison = meter.compare(structure, QUICK if bench.quick else BENCH)
    widths = groups.canonical(structure).widths()
    fewer = float(macs(ops)) / float(macs(ops, np.array([widths[n] for n in groups.names])))
    ratio = comparison.ratio("thin")
    return {
        "dense_ms": comparison.measurements["dense"].p50,
        "pruned_ms": comparison.measurements["thin"].p50,
        "speedup": ratio.to_json(),
        "macs": fewer,
        "realisation": ratio.value / fewer,
        "noisy": any(m.noisy for m in comparison.measurements.values()),
        "version": made.version(),
    }


def apart(bench: Bench, name: str, backend: str, precision: str, batch: int, size: tuple[int, int] = SIZE) -> Row:
    """`compare` in a process of its own; what can't be compiled here at all starts none.

    Raises:
        BadInput: The process ended without a row.
    """
    from passdeploy.engines._child import died
    from passdeploy.engines.base import get_backend
    from passdeploy.targets import Target

    target = Target(bench.target, bench.device, bench.capability, backend, precision, batch, 1, True)
    if reason := get_backend(backend).available(target):
        return {"skipped": reason}
    about = {"device": bench.device, "capability": bench.capability, "target": bench.target, "quick": bench.quick}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "row.json")
        job = {"bench": about, "case": [name, backend, precision, batch, size]}
        words = [sys.executable, "-m", __name__, json.dumps(job), str(out)]
        done = subprocess.run(
            words, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace"
        )
        if not out.exists():
            raise died(backend, done.returncode, done.stdout)
        row: Row = json.loads(out.read_text())
    return row


def answer(job: dict[str, Any], out: Path) -> None:
    """The child's side of `apart`."""
    name, backend, precision, batch, size = job["case"]
    try:
        row = compare(Bench(folder=out.parent, runs=out.parent, **job["bench"]), name, backend, precision, batch, size)
    except Exception as error:
        row = failure(error)
    out.write_text(json.dumps(row))


def run(bench: Bench) -> None:
    """The whole table; the quick one is ResNet-18, fp16, batch 1 and 64."""
    from passdeploy.engines.base import backends

    models, batches, precisions = (("resnet18",), (1, 64), ("fp16",)) if bench.quick else (MODELS, BATCHES, PRECISIONS)
    names = [name for name in backends() if name != "openvino"]
    for model, precision, batch, backend in itertools.product(models, precisions, batches, names):
        bench.case(
            "engines",
            f"{model} {precision} batch {batch} {backend}",
            lambda m=model, b=backend, p=precision, n=batch: apart(bench, m, b, p, n),  # type: ignore[misc]
        )


if __name__ == "__main__":
    answer(json.loads(sys.argv[1]), Path(sys.argv[2]))
