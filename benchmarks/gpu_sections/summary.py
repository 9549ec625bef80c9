"""summary.md: every section's rows as tables, with the device, the driver and the versions they hold for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from benchmarks.gpu_sections.base import Bench, Row

GOALS = {"of_copy_bandwidth": 0.85, "times_eager": 3.0, "times_compile": 1.0, "search_step": 1.05}


def _number(value: Any, digits: int = 3, unit: str = "") -> str:
    if value is None:
        return ""
    return f"{value:.{digits}f}{unit}"


def _interval(ratio: dict[str, Any] | None) -> str:
    if not ratio or ratio.get("value") is None:
        return ""
    low, high = ratio.get("low"), ratio.get("high")
    ends = f" ({low:.2f} to {high:.2f})" if low is not None and high is not None else ""
    return f"{ratio['value']:.2f}x{ends}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _reason(row: Row) -> str:
    return row.get("error") or row.get("skipped") or ""


def _rtx(rows: list[Row]) -> str:
    cells = [
        (
            r["key"],
            "no" if "error" in r else "yes",
            _number(r.get("p50_ms")),
            _number(r.get("difference"), 5),
            _reason(r),
        )
        for r in rows
    ]
    return "## TensorRT-RTX on this GPU\n\n" + _table(("asked for", "runs", "p50 ms", "difference", ""), cells)


def _kernels(found: dict[str, Any]) -> str:
    cells = []
    for name, case in found["cases"].items():
        ratios = [case["times_eager"], case["times_compile"]]
        met = case["of_copy_bandwidth"] >= GOALS["of_copy_bandwidth"]
        share = f"{case['of_copy_bandwidth']:.2f}" + ("" if met else " (goal 0.85)")
        cells.append((name, f"{case['us']['kernel']:.1f}", share, *map(_interval, ratios)))
    met = {
        goal: sum(
            (c[goal]["value"] if isinstance(c[goal], dict) else c[goal]) >= GOALS[goal] for c in found["cases"].values()
        )
        for goal in ("of_copy_bandwidth", "times_eager", "times_compile")
    }
    count = len(found["cases"])
    said = ", ".join(f"{name.replace('_', ' ')} of at least {GOALS[name]:g}: {n} of {count}" for name, n in met.items())
    head = ("case", "us", "of copy bandwidth", "over eager", "over torch.compile")
    failed = "".join(f"- {name}: {why}\n" for name, why in found.get("failed", {}).items())
    text = f"## Kernels\n\nCopy bandwidth {found['copy_gb_per_s']:.0f} GB/s; {said}.\n\n" + _table(head, cells)
    return text + (f"\n\nNot finished:\n\n{failed}" if failed else "")


def _engines(rows: list[Row]) -> str:
    cells = [
        (
            r["key"],
            _number(r.get("dense_ms")),
            _number(r.get("pruned_ms")),
            _interval(r.get("speedup")),
            _number(r.get("macs"), 2, "x"),
            _number(r.get("realisation"), 2),
            _reason(r) or ("noisy" if r["noisy"] else ""),
        )
        for r in rows
    ]
    head = ("engine", "dense ms", "half as wide ms", "speed-up", "MACs", "realisation", "")
    return "## Engines\n\nDense against all widths halved, interleaved.\n\n" + _table(head, cells)


def _budgets(rows: list[Row]) -> str:
    cells = [
        (
            r["key"],
            r.get("status", "failed"),
            _interval(r.get("speedup")),
            _number(r.get("macs"), 2, "x"),
            _number(r.get("realisation"), 2),
            _number(r.get("prediction_mape")),
            _number(r.get("builds_apart")),
            _reason(r),
        )
        for r in rows
    ]
    head = ("run", "status", "measured speed-up", "MACs", "realisation", "prediction's mean error", "builds apart", "")
    return "## Budgets\n\n" + _table(head, cells)


def _search(rows: list[Row]) -> str:
    cells = [
        (
            r["key"],
            _interval(r.get("step_ratio")),
            _number(r.get("search_step_s"), 4),
            _number(r.get("plain_step_s"), 4),
            _reason(r),
        )
        for r in rows
    ]
    head = ("search step", "over a plain step (goal 1.05)", "search s", "plain s", "")
    return "## Search\n\n" + _table(head, cells)


def _baselines(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        lines.append(f"{row['key']}: {_reason(row) or row['methods']}")
        lines += [f"- {json.dumps(each)}" for each in row.get("rows", ())]
    return "## PASS and baselines\n\n" + "\n".join(lines)


def render(bench: Bench) -> str:
    """The page; sections without rows are left out."""
    machine = json.loads((bench.folder / "machine.json").read_text())
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    parts = [
        f"# {machine['device']}",
        f"Compute capability {machine['compute_capability']}, driver {machine['driver']}; {versions}."
        + (" Quick run: few cases, few rounds." if machine["quick"] else ""),
    ]
    sections = {"rtx": _rtx, "engines": _engines, "budgets": _budgets, "search": _search, "baselines": _baselines}
    rendered = {name: render(rows) for name, render in sections.items() if (rows := bench.rows(name))}
    kernels = bench.folder / "kernels.json"
    if kernels.exists():
        rendered["kernels"] = _kernels(json.loads(kernels.read_text()))
    parts += [
        rendered[name] for name in ("budgets", "kernels", "search", "engines", "rtx", "baselines") if name in rendered
    ]
    return "\n\n".join(parts) + "\n"
