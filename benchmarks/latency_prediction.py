"""How well latency is predicted: structures that were not used for fitting, on the machine at hand.

    python benchmarks/latency_prediction.py --model resnet20 --size 32 --backend onnxruntime
    python benchmarks/latency_prediction.py --all            every configuration and backend
    python benchmarks/latency_prediction.py --table          prints the table from what lies in benchmarks/results
    python benchmarks/latency_prediction.py --refit FOLDER ...   today's latency model on measurements from before

The network is profiled as `passdeploy profile` does with more time and structures than by default
(`profile.seconds: 80`, `profile.structures: 240`), until its own error is 0.5 %; then other structures are measured,
each in several rounds some time apart: what is predicted is their median, and how far two measurements of one
structure lie apart is the repeatability of the measurement itself. They are predicted by the latency model and by two
baselines: latency proportional to MACs, and a table of single convolutions, measured in the same run and summed (as
HALP does, arXiv 2110.10811). Weights are random: latency does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from itertools import combinations, islice, product
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("KMP_BLOCKTIME", "0")

import numpy as np
import torch
from common import device_folder
from convolution_table import ConvolutionTable

from passdeploy.data.base import Preprocess
from passdeploy.engines.base import get_backend
from passdeploy.export import OnnxSlicer
from passdeploy.groups import find_groups, macs, operators
from passdeploy.latency.log import MeasurementLog
from passdeploy.latency.model import LatencyModel
from passdeploy.latency.profile import ODD, keep_first, profile, varied_widths
from passdeploy.latency.sampler import trust
from passdeploy.latency.steps import steps_of
from passdeploy.meter import Meter
from passdeploy.models import build
from passdeploy.search.prompt import InputStage, Prompted
from passdeploy.targets import resolve

CONFIGURATIONS = (("resnet20", 32), ("resnet18", 64), ("resnet18", 224), ("vgg16_bn", 64), ("mobilenet_v2", 224))
BACKENDS = ("onnxruntime", "openvino")
HELD_OUT_SEEDS = (1_000_003, 2_000_003, 3_000_003, 4_000_003)
"""Of the structures that are predicted: the last. By measurements of the others', the model's terms were chosen."""
HELD_OUT_ODD = 0.1
"""Share of them with widths on no grid; once that of those which a model is fitted to, too."""


def errors(predicted: np.ndarray, measured: np.ndarray) -> dict[str, float]:
    ape = np.abs(predicted / measured - 1)
    return {"mape": float(ape.mean()), "max_ape": float(ape.max()), "bias": float((predicted / measured - 1).mean())}


def repeatability(rounds: np.ndarray) -> dict[str, float]:
    """How far two measurements of one structure lie apart; `rounds` has a row per round, a column per structure."""
    apart = np.array([np.abs(a / b - 1) for a, b in combinations(rounds, 2)])
    return {"mean": float(apart.mean()), "max": float(apart.max())}


def evaluate(
    name: str, size: int, backend: str, seconds: float, held_out: int, rounds: int, folder: Path
) -> dict[str, Any]:
    target = resolve("cpu", backend=backend)
    torch.manual_seed(0)
    network = build(name, 10).eval()
    example = torch.randn(1, 3, size, size)
    groups = find_groups(network, example)
    ops = operators(network, example, groups)
    model = Prompted(InputStage(Preprocess(mean=(0.5,) * 3, std=(0.25,) * 3, size=(size, size))), network)
    images = np.random.default_rng(0).random((1, 3, size, size), dtype=np.float32)
    log_path = folder / f"{name}-{size}-{backend}.log.jsonl"
    measuring = log_path.with_suffix(".tmp")  # beside what is there, until hours of measuring are over
    measuring.unlink(missing_ok=True)
    log = MeasurementLog(measuring)
    steps = steps_of(target)
    with Meter(OnnxSlicer(model, groups, (3, size, size)), groups, target, images) as meter:
        start = time.perf_counter()
        fitted = profile(meter.sample, ops, groups, budget_s=seconds, log=log, target_key=backend,
                         steps=steps.candidates, good_enough=0.005)  # fmt: skip
        profiled_s = time.perf_counter() - start
        known = {tuple(w) for w in fitted.widths.astype(int)}
        widths = []
        for w in varied_widths(groups, HELD_OUT_SEEDS[-1], odd=HELD_OUT_ODD):
            if tuple(w) not in known and len(widths) < held_out:
                widths.append(w)
            if len(widths) == held_out:
                break
        structures = [keep_first(groups, w) for w in widths]
        ratios = np.array([[log.measure("held-out", s.digest(), backend, lambda s=s: meter.sample(s)).value["ratio"]
                            for s in structures] for _ in range(rounds)])  # fmt: skip
        table = ConvolutionTable(ops, target)
        dense = np.array(list(groups.units.values()), dtype=float)
    measured = np.median(ratios, axis=0)
    w = np.stack(widths).astype(float)
    measuring.replace(log_path)
    return {
        "model": name,
        "size": size,
        "backend": backend,
        "version": get_backend(backend).version(),
        "device": target.device,
        "dense_ms": fitted.dense_ms,
        "structures": {"fitted": len(fitted.ratios), "held_out": len(widths), "rounds": rounds},
        "profile_s": profiled_s,
        "step": fitted.step,
        "steps_swept": dict(steps.families),
        "cross_validated": {"mape": fitted.mape, "max_ape": fitted.max_ape},
        "repeatability": repeatability(ratios),
        "passdeploy": errors(fitted.ratios_many(w), measured),
        "macs": errors(np.asarray(macs(ops, w)) / macs(ops), measured),
        "convolution_table": errors(table.predict_many(w) / table.predict_many(dense[None]), measured),
        "load": os.getloadavg()[0],
    }


def table(folder: Path) -> str:
    rows = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    lines = [
        "| network | backend | n | repeats | passdeploy | MACs | convolutions summed | profile |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        cells = [
            f"{100 * r[k]['mape']:.1f} % ({100 * r[k]['max_ape']:.0f} %)"
            for k in ("passdeploy", "macs", "convolution_table")
        ]
        n, repeats = r["structures"], r["repeatability"]
        lines.append(
            f"| {r['model']} at {r['size']} | {r['backend']} | {n['fitted']} + {n['held_out']} "
            f"| {100 * repeats['mean']:.1f} % ({100 * repeats['max']:.0f} %) | {' | '.join(cells)} "
            f"| {r['profile_s']:.0f} s |"
        )
    return "\n".join(lines)


def refit(folder: Path) -> list[tuple[str, dict[str, float], dict[str, float]]]:
    """Per file of measurements: what it is of, the errors when it was made, and those of today's latency model.

    For work on the model, without measuring anything. A model that was chosen by these errors needs new measurements
    before anything is said of it.
    """
    found = []
    for path in sorted(folder.glob("*.log.jsonl")):
        row = json.loads(path.with_name(path.name.replace(".log.jsonl", ".json")).read_text())
        network = build(row["model"], 10).eval()
        example = torch.randn(1, 3, row["size"], row["size"])
        groups = find_groups(network, example)
        records = MeasurementLog(path).records
        profiled = [r for r in records if r.purpose == "profile" and r.repeat == 0 and "failed" not in r.value]
        held_out: dict[str, list[float]] = {}
        for r in records:
            if r.purpose == "held-out":
                held_out.setdefault(r.digest, []).append(r.value["ratio"])
        wanted = {r.digest for r in records}
        widths: dict[str, np.ndarray] = {}
        for seed, odd in product((0, *HELD_OUT_SEEDS), (ODD, HELD_OUT_ODD)):
            for w in islice(varied_widths(groups, seed, odd=odd), 2 * len(wanted)):
                widths.setdefault(keep_first(groups, w).digest(), w.astype(float))
        units = [group.units for group in groups.groups]
        fitted = LatencyModel.fit(
            operators(network, example, groups),
            units,
            np.stack([np.array(units, dtype=float), *(widths[r.digest] for r in profiled)]),
            np.array([1.0, *(r.value["ratio"] for r in profiled)]),
            row["dense_ms"],
            steps=[row["step"]],
            weights=np.array([1.0, *trust([r.value["dense_floor_ms"] for r in profiled])]),
        )
        measured = np.array([np.median(ratios) for ratios in held_out.values()])
        now = errors(fitted.ratios_many(np.stack([widths[digest] for digest in held_out])), measured)
        found.append((path.name.removesuffix(".log.jsonl"), row["passdeploy"], now))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--backend", default="onnxruntime", choices=BACKENDS)
    parser.add_argument("--seconds", type=float, default=80.0, help="for profiling")
    parser.add_argument("--held-out", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each of them")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--refit", type=Path, nargs="+", metavar="FOLDER")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("--rounds: two or more, or nothing is known of how measurements repeat")
    if args.refit:
        rows = [row for folder in args.refit for row in refit(folder / "latency-prediction")]
        for name, was, now in rows:
            said = [f"{100 * e['mape']:.1f} % ({100 * e['max_ape']:.0f} %)" for e in (was, now)]
            print(f"{name}: {said[0]} -> {said[1]}")
        for key in ("mape", "max_ape"):
            was, now = (100 * float(np.mean([row[i][key] for row in rows])) for i in (1, 2))
            print(f"{key}, in the mean of {len(rows)}: {was:.1f} % -> {now:.1f} %")
        return
    folder = device_folder() / "latency-prediction"
    folder.mkdir(parents=True, exist_ok=True)
    if not args.table:
        todo = (
            [(n, s, b) for n, s in CONFIGURATIONS for b in BACKENDS]
            if args.all
            else [(args.model, args.size, args.backend)]
        )
        for name, size, backend in todo:
            result = evaluate(name, size, backend, args.seconds, args.held_out, args.rounds, folder)
            (folder / f"{name}-{size}-{backend}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(table(folder))


if __name__ == "__main__":
    main()
