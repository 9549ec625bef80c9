"""Networks of thirteen families through all of `passdeploy run` at 1.5x: small data, few steps, every proof.

    python benchmarks/families.py                            those that have no row yet
    python benchmarks/families.py --only resnet18,unet       some of them
    python benchmarks/families.py --table                    prints the rows as a table

Each goes through all of `passdeploy run` and has to end inside the budget with equivalent steps. How accurate it is,
is not the question: it is trained for a few dozen steps from random weights. Images: a folder made from Fashion-MNIST,
64x64; the UNet takes `fashion-scenes`.

Rows are appended to benchmarks/results/DEVICE/families.jsonl; a measurement wants an otherwise quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("KMP_BLOCKTIME", "0")

import yaml
from common import device_folder
from PIL import Image

from passdeploy.data.fashion_mnist import CLASSES, articles
from passdeploy.targets import resolve

MODELS = (
    "resnet18", "resnet34", "resnet50", "vgg16", "resnext50_32x4d", "densenet121", "mobilenet_v2", "efficientnet_b0",
    "convnext_tiny", "shufflenet_v2_x1_0", "vit_b_16", "swin_t", "unet",
)  # fmt: skip
SIDE = 64
PER_CLASS = {"train": 64, "test": 20}


def image_folder(root: Path) -> Path:
    """An image folder of Fashion-MNIST images, 64x64."""
    for split, (images, labels) in zip(("train", "test"), articles(), strict=True):
        for label, name in enumerate(CLASSES):
            folder = root / split / name.replace("/", "-")
            folder.mkdir(parents=True)
            for i, pixels in enumerate(images[labels == label][: PER_CLASS[split]]):
                Image.fromarray(pixels).convert("RGB").resize((SIDE, SIDE)).save(folder / f"{i}.png")
    return root


def configuration(model: str, data: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Of one run."""
    segments = model == "unet"
    return {
        "model": model,
        "data": "fashion-scenes" if segments else str(data),
        "input_size": None if segments else [SIDE, SIDE],
        "target": args.target,
        "latency": args.latency,
        "train_batch": 16,
        "epochs": 0.02,
        "dense": {"epochs": 0.02, "min_steps": args.steps},
        "search": {"epochs": 0.02, "min_steps": args.steps},
        "finetune": {"min_steps": args.steps},
        "profile": {"seconds": args.seconds, "structures": 60, "cache": "off"},
    }


def run(model: str, data: Path, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Runs one network; what is worth a row of its report."""
    config = folder / f"{model}.yaml"
    config.write_text(yaml.safe_dump(configuration(model, data, args)))
    out = args.out / model if args.out else folder / model
    begun = time.perf_counter()
    command = [sys.executable, "-m", "passdeploy", "run", "--config", str(config), "--out", str(out), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    row: dict[str, Any] = {"model": model, "target": args.target, "asked": args.latency, "exit": done.returncode}
    row |= {"device": resolve(args.target).device, "steps": args.steps, "profile_s": args.seconds}
    row["seconds"] = round(time.perf_counter() - begun)
    if not (out / "report.json").is_file():
        return row | {"status": "failed", "error": (done.stderr.strip().splitlines() or ["no report"])[-1]}
    report = json.loads((out / "report.json").read_text())
    for key in ("status", "speedup", "predictor", "equivalence", "timing_s"):
        row[key] = report[key]
    sizes = [report[key] or {} for key in ("dense", "pruned")]
    return row | {"macs": [s.get("macs") for s in sizes], "latency": [s.get("latency_ms") for s in sizes]}


def rows_at(path: Path) -> list[dict[str, Any]]:
    """The last row of each network, in the order of `MODELS`."""
    lines = path.read_text().splitlines() if path.exists() else []
    last = {row["model"]: row for row in map(json.loads, lines)}
    return sorted(last.values(), key=lambda row: MODELS.index(row["model"]))


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = ["| network | status | latency | 95 % | MACs | worst proof | s |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        speed, proof = row.get("speedup") or {}, row.get("equivalence") or {}
        values = [proof.get(k) for k in ("masked_vs_thin", "thin_vs_onnx", "onnx_vs_engine")]
        worst = max((v for v in values if v is not None), default=None)
        interval = speed.get("latency_ci95") or []
        cells = [f"`{row['model']}`", row["status"]]
        cells += [f"{speed['latency']:.2f}x" if speed.get("latency") else ""]
        cells += [" to ".join(f"{end:.2f}" for end in interval)]
        cells += [f"{speed['macs']:.2f}x" if speed.get("macs") else "", "" if worst is None else f"{worst:.0e}"]
        lines.append("| " + " | ".join([*cells, str(row["seconds"])]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default=",".join(MODELS))
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--latency", default="1.5x")
    parser.add_argument("--steps", type=int, default=30, help="of each training")
    parser.add_argument("--seconds", type=float, default=30, help="for the profile")
    parser.add_argument("--out", type=Path, help="keep the run directories here; default: they are deleted")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    path = device_folder(args.target) / "families.jsonl"
    rows = rows_at(path)
    if args.table:
        print(table(rows))
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    done = {row["model"] for row in rows if row["status"] == "within_budget" and row["asked"] == args.latency}
    with tempfile.TemporaryDirectory() as name:
        data = image_folder(Path(name, "data"))
        for model in args.only.split(","):
            if model in done:
                continue
            row = run(model, data, args, Path(name))
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(table([row]).splitlines()[-1], row.get("error", ""), flush=True)


if __name__ == "__main__":
    main()
