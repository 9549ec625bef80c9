"""Makes example.json: a fixture with made-up but plausible numbers, not a measurement.

Run: python -m tests.reporting.make_example
"""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np

from passdeploy.reporting import schema as s
from passdeploy.reporting.engines import Alternative, Alternatives
from passdeploy.reporting.files import dumps
from passdeploy.reporting.picture import prompt_picture, rgb_picture
from passdeploy.workspace import write_atomic

FILE = Path(__file__).with_name("example.json")
random.seed(7)
rng = np.random.default_rng(7)


def calls(median: float, n: int = 4000) -> list[float]:
    """Latencies of single calls: a narrow mode, a shoulder and a long tail, as on a shared CPU."""
    body = median * np.exp(rng.normal(0, 0.012, n))
    shoulder = median * np.exp(rng.normal(0.045, 0.012, n // 7))
    tail = median * (1.06 + rng.exponential(0.06, n // 50))
    values = np.concatenate([body, shoulder, tail])
    return [float(v) for v in values * median / np.median(values)]


def latency(values: list[float], disturbed: int) -> s.Latency:
    ranked = sorted(values)

    def rank(q: float) -> float:
        return round(ranked[max(math.ceil(q * len(ranked)) - 1, 0)], 5)

    return s.Latency(
        p50=rank(0.5),
        p90=rank(0.9),
        p99=rank(0.99),
        mean=round(float(np.mean(ranked)), 5),
        n=len(ranked),
        spread=0.006,
        disturbed_blocks=disturbed,
    )


def groups() -> list[s.GroupInfo]:
    """ResNet-20: a residual stream and three inner widths per stage, nine blocks."""
    result, removed = [], {"layer1.1", "layer2.2", "layer3.1"}
    kept_inner = {1: (16, 0, 8), 2: (24, 16, 0), 3: (56, 0, 40)}
    stream = {1: (16, 16), 2: (32, 24), 3: (64, 56)}
    for stage, width in ((1, 16), (2, 32), (3, 64)):
        full, kept = stream[stage]
        members = ["conv1" if stage == 1 else f"layer{stage}.0.downsample.0"]
        members += [f"layer{stage}.{b}.conv2" for b in range(3)]
        result.append(
            s.GroupInfo(name=f"layer{stage}", kind="channel", units=full, kept=kept, members=members, share_macs=0.14)
        )
        for block in range(3):
            name = f"layer{stage}.{block}"
            gone = name in removed
            share = round((0.125 if stage == 1 else 0.105) * (0.85 + 0.3 * random.random()), 4)
            result.append(
                s.GroupInfo(
                    name=f"{name}.conv1",
                    kind="channel",
                    units=width,
                    kept=0 if gone else kept_inner[stage][block],
                    members=[f"{name}.conv1", f"{name}.bn1", f"{name}.conv2"],
                    share_macs=share,
                    share_latency=round(share * 0.9, 4),
                )
            )
            if block:
                result.append(
                    s.GroupInfo(
                        name=name,
                        kind="depth",
                        units=1,
                        kept=0 if gone else 1,
                        members=[f"{name}.{m}" for m in ("conv1", "bn1", "conv2", "bn2")],
                        share_macs=share,
                        share_latency=round(share * 0.97, 4),
                    )
                )
    return result


def curves() -> s.Curves:
    steps = list(range(0, 391, 10))
    t = np.array(steps) / 390
    loss = 0.62 * np.exp(-3.2 * t) + 0.31 + 0.28 * np.exp(-(((t - 0.42) / 0.18) ** 2)) + rng.normal(0, 0.015, len(t))
    accuracy: list[float | None] = [None] * len(t)
    for i in range(0, len(t), 8):
        accuracy[i] = round(float(0.915 - 0.10 * math.exp(-(((t[i] - 0.45) / 0.2) ** 2)) - 0.02 * t[i]), 4)
    ratio = 1 - 0.515 * np.clip(t / 0.72, 0, 1) ** 1.4 + rng.normal(0, 0.004, len(t))
    blocks = np.where(t < 0.3, 9, np.where(t < 0.5, 8, np.where(t < 0.66, 7, 6)))
    search = s.Curve(
        step=[float(v) for v in steps],
        series={
            "loss": [round(float(v), 4) for v in loss],
            "accuracy": accuracy,
            "latency_ratio": [round(float(v), 4) for v in ratio],
            "kept_blocks": [float(v) for v in blocks],
        },
    )
    fine = list(range(0, 1181, 20))
    u = np.array(fine) / 1180
    tuned = 0.34 * np.exp(-3 * u) + 0.19 + rng.normal(0, 0.012, len(u))
    acc: list[float | None] = [
        round(0.868 + 0.058 * (1 - math.exp(-4 * x)), 4) if i % 10 == 9 else None for i, x in enumerate(u)
    ]
    finetune = s.Curve(
        step=[float(v) for v in fine], series={"loss": [round(float(v), 4) for v in tuned], "accuracy": acc}
    )
    return s.Curves(search=search, finetune=finetune)


def prompt() -> s.PromptInfo:
    y, x = np.mgrid[0:32, 0:32]
    border = np.minimum(np.minimum(x, 31 - x), np.minimum(y, 31 - y)) < 3
    waves = np.stack([np.sin(x / (2.1 + c) + c) * np.cos(y / (1.7 + c / 2) - c) for c in range(3)])
    pixels = (0.12 * waves + rng.normal(0, 0.05, waves.shape)) * border
    shirt = 0.15 + 0.6 * ((abs(x - 15.5) < 8) & (y > 6) & (y < 28) | (abs(x - 15.5) < 12) & (y > 6) & (y < 12))
    image = np.clip(np.repeat(shirt[None], 3, 0) + rng.normal(0, 0.02, (3, 32, 32)) + pixels, 0, 1)
    return s.PromptInfo(
        kind="additive",
        width=3,
        size=(32, 32),
        png=prompt_picture(pixels),
        example_png=rgb_picture(image),
        largest=round(float(abs(pixels).max()), 3),
        accuracy_with=0.9281,
        accuracy_without=0.9246,
    )


def example() -> s.Report:
    dense_calls, pruned_calls = calls(0.5814), calls(0.2811)
    dense, pruned = latency(dense_calls, 1), latency(pruned_calls, 0)
    return s.Report(
        status="within_budget",
        target=s.TargetInfo(
            name="cpu",
            device="Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz (AVX-512)",
            backend="onnxruntime",
            precision="fp32",
            batch=1,
            threads=1,
            attached=True,
        ),
        budget=s.BudgetInfo(asked="2x", latency_ms=0.2907, percentile="p50", scope="engine"),
        method="pass",
        seed=0,
        dense=s.NetworkInfo(accuracy=0.9331, macs=41_214_848, params=272_474, latency_ms=dense),
        pruned=s.NetworkInfo(accuracy=0.9272, macs=18_403_120, params=121_960, latency_ms=pruned),
        speedup=s.Speedup(latency=2.068, latency_ci95=(2.051, 2.083), macs=2.24, realisation=0.923),
        predictor=s.PredictorInfo(kind="measured", mape=0.021, max_ape=0.064, n=36, repeatability=0.011),
        equivalence=s.Equivalence(
            masked_vs_thin=1.9e-6,
            thin_vs_onnx=8.7e-7,
            onnx_vs_engine=0.0,
            top1_agreement=1.0,
            tolerance=1e-4,
            images=256,
        ),
        timing_s={
            "profile": 31.2,
            "search": 64.8,
            "fit": 11.3,
            "finetune": 88.1,
            "compile": 1.4,
            "bench": 9.7,
        },
        environment=s.Environment(
            cpu="Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz, 2 cores",
            gpu=None,
            driver=None,
            versions={
                "passdeploy": "0.1.0",
                "python": "3.11.2",
                "torch": "2.13.0",
                "onnxruntime": "1.32.0",
                "numpy": "2.4.6",
            },
            settings={"OMP_WAIT_POLICY": "passive", "intra-op spinning": "off", "kernel": "Linux 6.1"},
        ),
        groups=groups(),
        frozen={"fc": "its channels are the network's outputs"},
        distribution=s.Distribution.of(dense_calls, pruned_calls),
        prompt=prompt(),
        curves=curves(),
        health=[
            s.HealthCheck(name="loss", ok=True, message="fell from 0.93 to 0.34 over the search"),
            s.HealthCheck(name="masks", ok=True, message="settled: 0.4 % of the units changed in the last quarter"),
            s.HealthCheck(name="prompt gradient", ok=True, message="median norm 3.1e-3, never below 1e-5"),
            s.HealthCheck(
                name="collapse",
                ok=False,
                message="layer1.2.conv1 is down to 8 of 16 units, its floor: no further cut there",
            ),
        ],
        candidates=[
            s.Candidate(asked_ms=0.2849, predicted_ratio=0.4893, measured_ratio=0.5161),
            s.Candidate(asked_ms=0.2702, predicted_ratio=0.4640, measured_ratio=0.4925),
            s.Candidate(asked_ms=0.2661, predicted_ratio=0.4560, measured_ratio=0.4581),
            s.Candidate(asked_ms=0.2782, predicted_ratio=0.4771, measured_ratio=0.4838, accuracy=0.9286, chosen=True),
        ],
        why_not_faster=[
            s.Reason(
                text="Launch floor: 19 operators cost about 4 us each before any work is done.",
                share=0.27,
                value=0.076,
                unit="ms",
            ),
            s.Reason(
                text="Layers that can't be pruned: the first convolution's input and the classifier's output.",
                share=0.05,
            ),
            s.Reason(text="Widths below 16 are padded to the blocked layout of this CPU (layer1.2.conv1).", share=0.03),
        ],
        messages=["Accuracy is on the 10,000 test images; every choice was made on 5,000 validation images."],
        accuracy_points=[
            s.AccuracyPoint(label="dense", kind="dense", accuracy=0.9331, latency_ms=dense.p50, macs=41_214_848),
            s.AccuracyPoint(
                label="pruned, before fine-tuning", kind="before_finetune", accuracy=0.8684, latency_ms=pruned.p50
            ),
            s.AccuracyPoint(label="pruned", kind="pruned", accuracy=0.9272, latency_ms=pruned.p50, macs=18_403_120),
            s.AccuracyPoint(label="dense int8", accuracy=0.9318, latency_ms=0.497),
        ],
        provenance=s.Provenance(
            command="passdeploy run --model resnet20 --data fashion-mnist --target cpu --latency 2x --out runs/demo",
            created="2026-11-21T10:42:07+00:00",
            commit="4f1c2ab",
            model="resnet20",
            data="Fashion-MNIST",
            config_sha256="9b1d7c5e0f2a4b6c8d9e0f1a2b3c4d5e6f708192a3b4c5d6e7f8091a2b3c4d5e",
            splits={
                "train": s.Split(images=55_000, used_for="search, fine-tuning"),
                "validation": s.Split(images=5_000, used_for="every choice"),
                "test": s.Split(images=10_000, used_for="the accuracies in this report"),
            },
            engine="engine/model.onnx",
            engine_sha256="e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        ),
        budgets=[
            s.BudgetResult(
                asked="1.5x",
                status="within_budget",
                accuracy=0.9318,
                latency_ms=0.379,
                speedup=1.534,
                path="1.5x/report.html",
            ),
            s.BudgetResult(asked="2x", status="within_budget", accuracy=0.9272, latency_ms=pruned.p50, speedup=2.068),
            s.BudgetResult(
                asked="3x",
                status="within_budget",
                accuracy=0.9139,
                latency_ms=0.189,
                speedup=3.071,
                path="3x/report.html",
            ),
        ],
        alternatives=Alternatives(
            dense_latency_ms=dense,
            dense_bytes=1_105_408,
            pruned_bytes=502_784,
            precisions=[
                Alternative(precision="fp16", reason="fp16 is not offered on a CPU, which a CPU computes in fp32"),
                Alternative(
                    precision="int8",
                    engine_bytes=331_776,
                    accuracy=0.9318,
                    accuracy_of="engine",
                    latency_ms=latency(calls(0.497), 0),
                    speedup=1.171,
                    speedup_ci95=(1.162, 1.18),
                    meets_budget=False,
                ),
            ],
        ),
    )


if __name__ == "__main__":
    write_atomic(FILE, dumps(example().to_json()))
