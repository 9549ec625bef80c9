"""How often `bench` claims what is not so, on a busy machine.

    python benchmarks/bench_under_load.py --times 50 --load 2

One engine is benched against itself, and against one that is about 8 % slower (what it is, CPU time says), while
`--load` processes keep the cores busy. Shown: how often a difference is claimed where there is none, and how often
the slower one is not found (`--fail-if-slower 5%`).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from collections import Counter
from contextlib import ExitStack
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
from common import device_folder

from passdeploy.data.base import Preprocess
from passdeploy.export import OnnxSlicer
from passdeploy.groups import find_groups, operators
from passdeploy.latency.measure import BENCH, interleave
from passdeploy.latency.profile import keep_first, profile, varied_widths
from passdeploy.latency.sampler import Sampler
from passdeploy.meter import Meter
from passdeploy.models import build
from passdeploy.search.prompt import InputStage, Prompted
from passdeploy.targets import resolve
from passdeploy.timing import open_runner


def busy() -> None:
    """A process that computes and touches memory for ever."""
    rng = np.random.default_rng(0)
    data = rng.random((512, 512))
    while True:
        data = np.tanh(data @ data / 256)


def experiment(times: int, load: int) -> dict[str, Any]:
    target = resolve("cpu", backend="onnxruntime")
    torch.manual_seed(0)
    network = build("resnet20", 10).eval()
    groups = find_groups(network, example := torch.randn(1, 3, 32, 32))
    model = Prompted(InputStage(Preprocess((32, 32))), network)
    images = np.random.default_rng(0).random((1, 3, 32, 32), dtype=np.float32)
    with Meter(OnnxSlicer(model, groups, (3, 32, 32)), groups, target, images) as meter, ExitStack() as stack:
        fitted = profile(meter.sample, operators(network, example, groups), groups, budget_s=15)
        candidates = np.stack([w for w, _ in zip(varied_widths(groups, 5), range(4000), strict=False)])
        ratios = fitted.ratios_many(candidates.astype(float))
        thin = keep_first(groups, candidates[int(np.abs(ratios * 1.08 - 1).argmin())])

        def load_runner(structure: Any) -> Any:
            return stack.enter_context(open_runner(meter.engine(structure), target, images))

        dense, again, faster = (load_runner(s) for s in (groups.dense(), groups.dense(), thin))
        slower_by = 1 / Sampler(dense, one_thread=True, rounds=60, most=60)(faster)["ratio"] - 1
        processes = [multiprocessing.Process(target=busy, daemon=True) for _ in range(load)]
        for process in processes:
            process.start()
        try:
            itself, slower, seconds = Counter[str](), Counter[str](), []
            for _ in range(times):
                same = interleave({"a": dense, "b": again}, BENCH)
                itself[same.verdict("b")] += 1
                other = interleave({"a": faster, "b": dense}, BENCH)
                slower[str(other.not_slower("b", 0.05))] += 1
                seconds.append(other.measurements["a"].blocks)
        finally:
            for process in processes:
                process.kill()
    return {
        "device": target.device,
        "times": times,
        "load": load,
        "load_average": os.getloadavg()[0],
        "itself": dict(itself),
        "slower_by": slower_by,
        "not_slower_by_5_percent": dict(slower),
        "median_rounds": float(np.median(seconds)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--load", type=int, default=2)
    args = parser.parse_args()
    result = experiment(args.times, args.load)
    folder = device_folder()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench_under_load.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
