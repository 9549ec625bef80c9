"""Does TensorRT-RTX run on this GPU? Asked to compile for what is attached, for nothing in particular, and for SM80.

Its builder names SM75, 80, 86, 89, 120 and 121; for a GPU of another compute capability (9.0, 10.x) this is the way to
find out what works. Builds and loads happen in child processes: a crash is an answer.
"""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu_sections.base import Bench, Row

SHAPE = (3, 224, 224)


@cache
def _graph(name: str) -> Path:
    import torch

    from passdeploy.export import export_onnx
    from passdeploy.models import build

    torch.manual_seed(0)
    folder = Path(tempfile.mkdtemp(prefix="passdeploy-gpu-"))
    return export_onnx(build(name, 1000), folder / f"{name}.onnx", SHAPE)


def _asked(capability: str) -> dict[str, Any]:
    return {"attached (CURRENT)": "current", "none given": None, "SM80": [[8, 0]], capability: [capability.split(".")]}


def attempt(precision: str, capabilities: Any) -> Row:
    """Builds ResNet-18 for `capabilities`, loads it here, and compares one output with ONNX Runtime's."""
    from passdeploy.engines._child import Server, run_job
    from passdeploy.engines._trt import CHILD
    from passdeploy.engines.base import CompileInput
    from passdeploy.engines.tensorrt_rtx import TensorRtRtx
    from passdeploy.export import onnx_function
    from passdeploy.targets import Target

    rtx = TensorRtRtx()
    path = _graph("resnet18")
    images = np.random.default_rng(0).random((4, *SHAPE), dtype=np.float32)
    target = Target("gpu", "gpu", "8.0", rtx.name, precision, 1, 1, True)
    graph = rtx.graph_for(CompileInput(path, samples=images), target)
    with tempfile.TemporaryDirectory() as folder:
        onnx_path, engine = Path(folder, "model.onnx"), Path(folder, "engine")
        onnx_path.write_bytes(graph)
        job = {"onnx": str(onnx_path), "engine": str(engine), "inputs": {"images": [1, *SHAPE]}, "batches": [1, 1, 1]}
        job |= {"options": {}, "compute_capabilities": capabilities}
        built = run_job(CHILD, job, "build", env=rtx.environment)
        server = Server(CHILD, "load", rtx.environment)
        try:
            key = server.ask("load", str(engine), 1)
            server.ask("bind", key, {"images": images[:1]})
            got = server.ask("run", key, {"images": images[:1]})["logits"]
            times = [device for device, _ in server.ask("block", key, 0.2, 50)]
        finally:
            server.stop()
    expected = onnx_function(path.read_bytes())(images[:1])
    difference = float(np.max(np.abs(got - expected)) / np.max(np.abs(expected)))
    return {"build_s": round(built["seconds"], 2), "difference": difference, "p50_ms": 1e3 * float(np.median(times))}


def run(bench: Bench) -> None:
    """Every way of asking, in fp32, fp16 and int8."""
    from passdeploy.engines._common import missing

    if reason := missing("tensorrt_rtx", "tensorrt-rtx-cu13") or missing("polygraphy", "polygraphy"):
        bench.say(f"rtx: left out; {reason}")
        return
    for precision in ("fp16",) if bench.quick else ("fp32", "fp16", "int8"):
        for name, asked in _asked(bench.capability).items():
            if asked not in ("current", None):
                asked = [[int(part) for part in pair] for pair in asked]
            bench.case("rtx", f"{name} {precision}", lambda p=precision, a=asked: attempt(p, a))  # type: ignore[misc]
