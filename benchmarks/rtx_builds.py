"""Builds TensorRT-RTX engines for every GPU that TensorRT-RTX knows, on a machine without one.

    python benchmarks/rtx_builds.py [MODEL ...]

Appends a row per model, precision and compute capability to benchmarks/results/no-gpu/rtx_builds.jsonl and leaves out
rows that are there already, so that it continues where it stopped. What is shown is that they build, how large they are
and how long it took; nothing is run. int8 is calibrated on noise: its scales do not matter here.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from passdeploy.engines.base import CompileInput
from passdeploy.engines.tensorrt_rtx import KNOWN, TensorRtRtx
from passdeploy.errors import PassdeployError
from passdeploy.export import export_onnx
from passdeploy.models import build
from passdeploy.targets import Target

MODELS = ("resnet18", "resnet50", "vgg16", "mobilenet_v2", "vit_b_16")
PRECISIONS = ("fp32", "fp16", "int8")
RESULTS = Path(__file__).parent / "results" / "no-gpu" / "rtx_builds.jsonl"
SIZE = (3, 224, 224)


class Cached(TensorRtRtx):
    """Converts a graph once for all GPUs that take the same one."""

    def __init__(self) -> None:
        self.graphs: dict[tuple[str, str, bool], bytes] = {}

    def convert(self, data: bytes, source: CompileInput, target: Target) -> bytes:
        key = (str(source.onnx), target.precision, target.compute_capability == "7.5")
        if key not in self.graphs:
            self.graphs = {key: super().convert(data, source, target)}
        return self.graphs[key]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=MODELS)
    arguments = parser.parse_args()
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    done = {(r["model"], r["precision"], r["compute_capability"]) for r in map(json.loads, lines)}
    backend = Cached()
    anything = Target("any", "any GPU", "8.0", backend.name, "fp16", 1, 1, False)
    for name in arguments.models:
        wanted = [(p, f"{a}.{b}") for p in PRECISIONS for a, b in KNOWN if (name, p, f"{a}.{b}") not in done]
        if not wanted:
            continue
        with tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(0)
            path = export_onnx(build(name, 1000), Path(folder, f"{name}.onnx"), SIZE)
            samples = np.random.default_rng(0).random((2, *SIZE), dtype=np.float32)
            for precision, capability in wanted:
                target = dataclasses.replace(anything, precision=precision, compute_capability=capability)
                row = {"model": name, "precision": precision, "compute_capability": capability}
                begun = time.perf_counter()
                try:
                    engine = backend.compile(CompileInput(path, samples=samples), target)
                    row |= {"mib": round(len(engine.data) / 2**20, 1), "build_s": engine.meta["build_s"]}
                except PassdeployError as error:
                    row |= {"error": str(error)}
                row |= {"seconds": round(time.perf_counter() - begun, 1), "version": backend.version()}
                print(json.dumps(row), flush=True)
                with RESULTS.open("a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
