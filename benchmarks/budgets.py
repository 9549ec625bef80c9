"""Are budgets met? Five networks, five speed-ups each, re-measured outside passdeploy.

    python benchmarks/budgets.py --model resnet20 --size 32
    python benchmarks/budgets.py --all              every configuration; what is there already is not run again
    python benchmarks/budgets.py --table            prints the table from the rows that are there
    python benchmarks/budgets.py --search-cost      one search serving five budgets against one serving one

Latency is the subject here, not accuracy: the networks train for a few steps on a few hundred images of Fashion-MNIST,
at the configuration's input size, and every budget goes through the whole of `passdeploy run`. Then `dense.onnx` and
`model.onnx` are timed in plain ONNX Runtime (benchmarks/remeasure.py; nine processes). Each row is appended to
`benchmarks/results/<device>/budgets.jsonl` as it comes.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from common import device_folder
from PIL import Image
from remeasure import measure

from passdeploy import data as datasets

CONFIGURATIONS = (("resnet20", 32), ("resnet18", 64), ("resnet18", 224), ("vgg16_bn", 64), ("mobilenet_v2", 224))
BUDGETS = ("1.25x", "1.5x", "2x", "3x", "4x")
LOW, HIGH = 0.97, 1.10
"""What was re-measured outside, over what was asked, has to lie between these."""
PROCESSES = 9
"""What does not fit a core's own cache shares the rest with other tenants: single processes differ by up to 20 %."""
PER_CLASS = {"train": 64, "test": 16}
STEPS = 40


def few_images(folder: Path) -> Path:
    """A folder of PNG files, a few hundred images of Fashion-MNIST; made once."""
    if not (folder / "test").exists():
        source = datasets.load("fashion-mnist")
        for split, count in PER_CLASS.items():
            part = source.train if split == "train" else source.test
            for label, name in enumerate(source.classes):
                place = folder / split / re.sub(r"\W+", "-", name.lower())
                place.mkdir(parents=True, exist_ok=True)
                chosen = (part.labels == label).nonzero().flatten()[:count]
                for i, image in enumerate(part.images(chosen)):
                    pixels = (image.permute(1, 2, 0).numpy() * 255).round().astype("uint8")
                    Image.fromarray(pixels).save(place / f"{i}.png")
    return folder


def configuration(model: str, size: int, data: Path, latency: tuple[str, ...], steps: int = STEPS) -> dict[str, Any]:
    few = {"epochs": 0.01, "min_steps": steps}
    return {
        "model": model, "data": str(data), "input_size": [size, size], "latency": list(latency), "train_batch": 16,
        "epochs": 0.01, "dense": few, "search": few, "finetune": {"min_steps": 4},
    }  # fmt: skip


def passdeploy_run(config: dict[str, Any], out: Path) -> None:
    """`passdeploy run` as a user types it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "passdeploy", "run", "--config", str(path), "--out", str(out)]
    status = subprocess.run(command).returncode
    if status not in (0, 1):
        raise SystemExit(f"passdeploy run ended with {status}")


def evaluate(model: str, size: int, have: set[str], runs: Path, data: Path, rows: Path) -> None:
    """Runs and re-measures the budgets of a network that are not there yet."""
    out = runs / f"{model}-{size}"
    start = time.monotonic()
    passdeploy_run(configuration(model, size, data, BUDGETS), out)
    seconds = time.monotonic() - start
    for asked in (asked for asked in BUDGETS if asked not in have):
        report = json.loads((out / asked / "report.json").read_text())
        reached = None
        fit = json.loads((out / asked / "fit" / "fit.json").read_text())
        outside = None
        if report["status"] == "infeasible":
            reached = fit["reachable"]["speedup"]
        else:
            outside = measure(out / "dense.onnx", out / asked / "model.onnx", PROCESSES)
        row = {
            "model": model, "size": size, "asked": asked, "status": report["status"], "outside": outside,
            "report": report["speedup"], "reachable": reached, "measurements": len(fit["candidates"]),
            "equivalence": report["equivalence"], "run_s": round(seconds), "device": report["target"]["device"],
            "versions": report["environment"]["versions"], "measured": time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime()),
        }  # fmt: skip
        with rows.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(
            json.dumps({key: row[key] for key in ("model", "size", "asked", "status", "reachable")} | (outside or {}))
        )


def again(row: dict[str, Any], runs: Path) -> dict[str, Any]:
    """The row with its network re-measured outside, where its run is still there."""
    out = runs / f"{row['model']}-{row['size']}"
    model = out / row["asked"] / "model.onnx"
    if row["outside"] is None or not model.exists():
        return row
    return row | {"outside": measure(out / "dense.onnx", model, PROCESSES)}


def search_cost(runs: Path, data: Path, results: Path) -> dict[str, Any]:
    """Seconds of the search stage, for five budgets and for one, in turns."""
    seconds: dict[str, list[float]] = {"one": [], "five": []}
    for turn in range(3):
        for name, latency in (("one", ("2x",)), ("five", BUDGETS)):
            out = runs / f"search-{name}"
            if turn == 0:
                passdeploy_search(configuration("resnet20", 32, data, latency, steps=160), out)
            shutil.rmtree(out / "search", ignore_errors=True)
            passdeploy_search(configuration("resnet20", 32, data, latency, steps=160), out)
            seconds[name].append(json.loads((out / "search" / "stage.json").read_text())["seconds"])
    ratio = statistics.median(five / one for five, one in zip(seconds["five"], seconds["one"], strict=True))
    found = {"model": "resnet20", "size": 32, "steps": 160, "seconds": seconds, "ratio": ratio}
    (results / "search-budgets.json").write_text(json.dumps(found, indent=1) + "\n")
    return found


def passdeploy_search(config: dict[str, Any], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.yaml").write_text(yaml.safe_dump(full(config)))
    subprocess.run([sys.executable, "-m", "passdeploy", "search", "--out", str(out)], check=True)


def full(config: dict[str, Any]) -> dict[str, Any]:
    from passdeploy.config import make_config

    return make_config(config).to_json()


def verdict(row: dict[str, Any]) -> str:
    if row["outside"] is None:
        return f"infeasible: at most {row['reachable']:.2f}x"
    outside = row["outside"].get("bound", row["outside"])  # the engine alone, where that was measured
    share = outside["ratio"] / float(row["asked"].rstrip("x"))
    return f"{outside['ratio']:.2f}x" + ("" if LOW <= share <= HIGH and row["status"] == "within_budget" else " (!)")


def table(rows: list[dict[str, Any]]) -> str:
    """A row per network, a column per budget: what was re-measured outside."""
    lines = [f"| network | {' | '.join(BUDGETS)} |", "|---" * (len(BUDGETS) + 1) + "|"]
    for model, size in CONFIGURATIONS:
        found = {row["asked"]: row for row in rows if (row["model"], row["size"]) == (model, size)}
        if found:
            cells = [verdict(found[asked]) if asked in found else "" for asked in BUDGETS]
            lines.append(f"| {model} at {size} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--outside", action="store_true", help="re-measure the network's runs that are there")
    parser.add_argument("--search-cost", action="store_true")
    parser.add_argument("--runs", type=Path, default=Path("runs/budgets"))
    args = parser.parse_args()
    results = device_folder()
    results.mkdir(parents=True, exist_ok=True)
    path = results / "budgets.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if not args.table:
        data = few_images(args.runs / "data")
        if args.search_cost:
            print(json.dumps(search_cost(args.runs, data, results)))
            return
        if args.outside:
            chosen = CONFIGURATIONS if args.all else ((args.model, args.size),)
            rows = [again(row, args.runs) if (row["model"], row["size"]) in chosen else row for row in rows]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            print(table(rows))
            return
        for model, size in CONFIGURATIONS if args.all else ((args.model, args.size),):
            have = {row["asked"] for row in rows if (row["model"], row["size"]) == (model, size)}
            if have != set(BUDGETS):
                evaluate(model, size, have, args.runs, data, path)
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    print(table(rows))


if __name__ == "__main__":
    main()
