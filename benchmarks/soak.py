"""Soak of a served bundle: a real Triton server, many requests at once, two bundles swapped under load.

    python benchmarks/soak.py                    100,000 requests, concurrency 16, 20 swaps
    python benchmarks/soak.py --run runs/demo    serves the run's bundle and one made from its dense graph

Every answer is compared with what the runner says; the p50 overhead over the bare engine is reported. Exit 0 only when
no request was lost and no answer was wrong. Writes benchmarks/results/DEVICE/soak.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

from common import RESULTS, folder_name

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def _small_bundles(folder: Path) -> tuple[Path, Path]:
    """Two small networks with different weights."""
    from passdeploy.shipping.bundle import write_bundle
    from tests.shipping.conftest import make_source

    a, b = (
        write_bundle(folder / name / "bundle", make_source(folder / name / "run", seed=seed))
        for seed, name in enumerate("ab")
    )
    return a, b


def _bundles_of(run: Path, folder: Path) -> tuple[Path, Path]:
    """The run's bundle, and a bundle of the same input and classes around the dense graph."""
    from passdeploy.data.base import Preprocess
    from passdeploy.engines.base import CompileInput, get_backend
    from passdeploy.shipping.bundle import BundleSource, EngineSource, write_bundle
    from passdeploy.shipping.contents import open_bundle
    from passdeploy.shipping.repository import find_bundle
    from passdeploy.targets import Target

    first = find_bundle(run)
    contents = open_bundle(first)
    manifest = contents.manifest
    dense = manifest["parts"]["dense_onnx"]
    path = first / dense["file"] if dense else run / "dense.onnx"
    target = Target("cpu", "CPU", None, "onnxruntime", "fp32", manifest["input"]["shape"][0], 1, attached=True)
    backend = get_backend("onnxruntime")
    backend.save(backend.compile(CompileInput(path), target), folder / "engine")
    pre = manifest["preprocess"]
    source = BundleSource(
        name="dense",
        model=manifest["model"],
        data=manifest["data"],
        classes=contents.classes,
        preprocess=Preprocess(tuple(pre["size"]), pre["resize"], tuple(pre["mean"]), tuple(pre["std"])),
        onnx=path,
        engines=(EngineSource(folder / "engine", target),),
        images=contents.samples()[0],
    )
    return first, write_bundle(folder / "dense" / "bundle", source)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a run whose bundle is served; default: two small networks")
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--swaps", type=int, default=20)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/DEVICE/soak.json")
    options = parser.parse_args()

    from passdeploy.shipping.repository import write_repository
    from passdeploy.shipping.servers.process import triton
    from passdeploy.targets import cpu_name
    from tests.shipping.serving import client, missing

    reason = missing()
    if reason is not None:
        print(f"soak: {reason}", file=sys.stderr)
        return 2
    folder = Path(tempfile.mkdtemp(prefix="passdeploy-soak-"))
    try:
        a, b = _bundles_of(options.run, folder) if options.run else _small_bundles(folder)
        models = folder / "models"
        write_repository(models, a, "triton", name="net")
        with triton(models, folder / "triton.log", load=("net",)) as server:
            counts = (options.requests, options.swaps, options.concurrency)
            arguments = (server.http, server.grpc, str(models), "net", str(a), str(b), *map(str, counts))
            told = json.loads(client("swap", *arguments, timeout=6 * 3600))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    model = json.loads((a / "bundle.json").read_text())["model"] if options.run else "small"
    told = {"device": cpu_name(), "model": model, "concurrency": options.concurrency} | told
    out = options.out or RESULTS / folder_name(cpu_name()) / "soak.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(told, indent=1) + "\n")
    print(json.dumps(told, indent=1))
    complete = told["requests"] >= options.requests and told["swaps"] == options.swaps
    return 0 if complete and not told["problems"] else 1


if __name__ == "__main__":
    sys.exit(main())
