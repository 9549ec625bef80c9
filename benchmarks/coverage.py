"""Which networks can be pruned, with every step proven: the table in docs/coverage.md.

    python benchmarks/coverage.py                       every network that has no row yet, small ones first
    python benchmarks/coverage.py --only 'regnet*'      some of them
    python benchmarks/coverage.py --again failed        those again that did not pass (or: all)
    python benchmarks/coverage.py --table               writes docs/coverage.md from the rows

Every torchvision classification and segmentation network of up to 150 M parameters, a UNet and one network of each of
many timm families, with random weights, norms and statistics (prunability and equivalence do not depend on training).
A network passes when at least half of its MACs can be pruned by width alone and, at its smallest, random and largest
prunable widths, the masked network equals the thin one and the thin one equals ONNX Runtime (relative difference at
most 1e-4 in float32); the TensorRT-RTX engine for compute capability 8.0 builds at the random widths; and a fresh
process gets identical outputs from architecture.json and model.safetensors.

Torch-Pruning's MagnitudePruner at 50 % is tried on the same networks. Each network runs in a process of its own with
limits on CPU time and memory, forked from one that has only imported the libraries, and so does what loads
its files again; rows are appended to benchmarks/results/DEVICE/coverage.jsonl, the last one counts.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("KMP_BLOCKTIME", "0")

import families
from common import device_folder
from coverage_child import work
from coverage_models import NEEDED, Case, cases

ROOT = Path(__file__).parent
PAGE = ROOT.parent / "docs" / "coverage.md"
TOOLS = ("passdeploy", "torch-pruning")
PACKAGES = ("torch", "torchvision", "timm", "torch-pruning", "onnxruntime", "tensorrt-rtx-cu13")
Row = dict[str, Any]


def results_file() -> Path:
    """benchmarks/results/DEVICE/coverage.jsonl."""
    return device_folder() / "coverage.jsonl"


def read_rows(path: Path) -> dict[tuple[str, str], Row]:
    """The last row of each network and tool."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {(row["model"], row["tool"]): row for row in map(json.loads, lines)}


def succeeded(row: Row) -> bool:
    """Whether a row says that all went well."""
    return bool(row.get("passed") if row["tool"] == "passdeploy" else row.get("reloads"))


def _child(what: str, name: str, folder: Path, args: argparse.Namespace) -> tuple[Row, str]:
    """What a step printed last, and why it ended early (empty when it did not)."""
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=work, args=(what, name, str(folder), args.cpu_seconds, args.memory_gib << 30))
    process.start()
    process.join()
    out, err = (path.read_text() if (path := folder / f"{what}.{kind}").exists() else "" for kind in ("out", "err"))
    rows = [line for line in out.splitlines() if line.startswith("{")]
    row: Row = json.loads(rows[-1]) if rows else {}
    if row.pop("done", False):
        return row, ""
    if process.exitcode in (-signal.SIGXCPU, -signal.SIGKILL):
        return row, f"more than {args.cpu_seconds} CPU seconds"
    return row, (err.strip().splitlines() or [f"ended with {process.exitcode}"])[-1][:200]


def run_one(case: Case, tool: str, args: argparse.Namespace) -> Row:
    """Tries one network with one tool in a process of its own, and its files in another."""
    row: Row = {"model": case.name, "tool": tool, "source": case.source, "family": case.family, "task": case.task}
    row["size"] = case.size
    with tempfile.TemporaryDirectory() as name:
        got, ended = _child(tool, case.name, Path(name), args)
        row |= got
        if not ended and tool == "passdeploy":
            again, problem = _child("reload", case.name, Path(name), args)
            row["seconds"] |= again.get("seconds", {})
            problem = problem or again["problem"]
            row["reloads"] = not problem
            row["problems"] += [f"reload: {problem}"] * bool(problem)
            row["passed"] = not row["problems"]
        row = json.loads(json.dumps(row).replace(f"{name}/", ""))
    row["cpu_s"] = round(sum(row.get("seconds", {}).values()), 1)
    if ended:
        step = row.pop("running", "start")
        row |= {"passed": False, "problems": [f"{step}: {ended}"], "problem": f"{step}: {ended}"}
    for place in (f"{ROOT.parent}/", f"{sys.prefix}/"):  # no path of this machine in an error
        row = json.loads(json.dumps(row).replace(place, ""))
    row["versions"] = {name: importlib.metadata.version(name) for name in PACKAGES}
    return row


def waiting(args: argparse.Namespace, path: Path) -> list[tuple[Case, str]]:
    """What is to be tried: networks and tools that were asked for and have no row (or one that failed)."""
    rows, todo = read_rows(path), []
    for tool in args.tools.split(","):
        for case in cases():
            if not any(fnmatchcase(case.name, pattern) for pattern in args.only.split(",")):
                continue
            old = rows.get((case.name, tool))
            if old is None or args.again == "all" or (args.again == "failed" and not succeeded(old)):
                todo.append((case, tool))
    return todo


def run(args: argparse.Namespace) -> None:
    path = results_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT.parent)])  # for the process that forks
    multiprocessing.set_forkserver_preload(["coverage_preload"])
    until = time.monotonic() + 60 * args.minutes

    def one(pair: tuple[Case, str]) -> None:
        if time.monotonic() > until:
            return
        case, tool = pair
        row = run_one(case, tool, args)
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        state = "pass" if succeeded(row) else "; ".join(row.get("problems", [row.get("problem", "no")]))
        share = f"{row['prunable']:.0%} prunable, " if "prunable" in row else ""
        print(f"{tool} {case.name}: {share}{state} ({row['cpu_s']} s)", flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(one, waiting(args, path)))


def _share(part: int, whole: int) -> str:
    return f"{part} of {whole} ({part / max(1, whole):.0%})"


def _proof(row: Row, name: str) -> str:
    values = [proof.get(name) for proof in row.get("proofs", {}).values()]
    return f"{max(values):.0e}" if len(values) == 3 and None not in values else "no"


def _line(ours: Row, theirs: Row | None) -> str:
    other = "not tried"
    if theirs is not None:
        told = [word for word in ("prunes", "runs", "reloads") if theirs.get(word)]
        other = ", ".join(told) or "no"
    reason = "pass" if ours.get("passed") else "; ".join(ours.get("problems", []))
    if ours.get("prunable", 1) < NEEDED and ours["frozen"]:
        common = Counter(why.split(":")[0] for name, why in ours["frozen"].items() if not name.startswith("depth"))
        reason += f" (most layers: {common.most_common(1)[0][0]})" if common else ""
    engine = f"{ours['engine_mib']} MiB" if "engine_mib" in ours else "no"
    cells = [
        f"`{ours['model']}`",
        f"{ours.get('params', 0) / 1e6:.1f}",
        f"{ours['prunable']:.0%}" if "prunable" in ours else "",
        f"{ours.get('channel_groups', '')} + {ours.get('depth_units', '')}",
        _proof(ours, "masked_vs_thin"),
        _proof(ours, "thin_vs_onnx"),
        engine,
        "identical" if ours.get("reloads") else "no",
        f"{ours['cpu_s']:.0f}",
        other,
        reason.replace("|", "/")[:200],
    ]
    return "| " + " | ".join(cells) + " |"


HEAD = """\
| network | M parameters | MACs prunable | groups + blocks | masked = thin | thin = ONNX | engine | reload | CPU s \
| Torch-Pruning | result |
|---|---|---|---|---|---|---|---|---|---|---|"""


def _section(title: str, rows: Iterable[Row], theirs: dict[str, Row]) -> list[str]:
    rows = list(rows)
    if not rows:
        return []
    passed = sum(bool(row.get("passed")) for row in rows)
    known = [theirs[row["model"]] for row in rows if row["model"] in theirs]
    lines = [f"## {title}", "", f"{_share(passed, len(rows))} pass."]
    if known:
        pruned = sum(bool(row.get("prunes") and row.get("runs")) for row in known)
        loaded = sum(bool(row.get("reloads")) for row in known)
        lines[-1] += (
            f" Torch-Pruning prunes and runs {_share(pruned, len(known))}; its own state file, which is a pickle, "
            f"loads again for {loaded} of them."
        )
    return [*lines, "", HEAD, *(_line(row, theirs.get(row["model"])) for row in rows), ""]


def table() -> str:
    """docs/coverage.md from the rows."""
    rows = read_rows(results_file())
    order = [case.name for case in cases()]
    ours = [rows[name, "passdeploy"] for name in order if (name, "passdeploy") in rows]
    theirs = {name: row for (name, tool), row in rows.items() if tool == "torch-pruning"}
    versions = ", ".join(f"{k} {v}" for k, v in ours[-1]["versions"].items()) if ours else ""
    about = (__doc__ or "").split("\n\n")[2].replace("\n", " ")
    lines = [
        "# Networks that can be pruned",
        "",
        "Written by `python benchmarks/coverage.py --table` from the rows that `python benchmarks/coverage.py` appends "
        f"to `benchmarks/results/{results_file().parent.name}/coverage.jsonl`. {about}",
        "",
        "*MACs prunable*: what goes when every channel group keeps one unit and all blocks stay. *groups + blocks*: "
        "channel groups and residual blocks that can be removed. *masked = thin*, *thin = ONNX*: the largest relative "
        "difference at the three widths. *Torch-Pruning*: what its `MagnitudePruner` at 50 % gets done: `prunes` (at "
        "least 5 % of the parameters are gone), `runs` (the forward pass works), `reloads` (its own state file gives "
        "identical outputs). One network, one tool: at most 900 CPU seconds and 12 GiB of memory.",
        "",
        f"Versions: {versions}. {len(ours)} of {len(order)} networks have been tried.",
        "",
    ]
    lines += _section("torchvision", (r for r in ours if r["source"] == "torchvision"), theirs)
    lines += _section("passdeploy", (r for r in ours if r["source"] == "passdeploy"), theirs)
    lines += _section("timm: a network of each family", (r for r in ours if r["source"] == "timm"), theirs)
    whole = families.rows_at(device_folder() / "families.jsonl")
    if whole:
        about = (families.__doc__ or "").split("\n\n")[2].replace("\n", " ")
        lines += ["## From end to end", "", f"`python benchmarks/families.py`. {about}", "", families.table(whole), ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="*", help="names or patterns, separated by commas")
    parser.add_argument("--tools", default=",".join(TOOLS))
    parser.add_argument("--again", choices=("none", "failed", "all"), default="none")
    parser.add_argument("--cpu-seconds", type=int, default=900, help="of one network's process")
    parser.add_argument("--memory-gib", type=int, default=12)
    parser.add_argument("--jobs", type=int, default=1, help="networks at a time; each takes one thread")
    parser.add_argument("--minutes", type=float, default=1e6, help="start no network after this time")
    parser.add_argument("--table", action="store_true", help="writes docs/coverage.md and stops")
    args = parser.parse_args()
    if args.table:
        PAGE.write_text(table())
        return
    run(args)


if __name__ == "__main__":
    main()
