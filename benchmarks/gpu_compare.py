"""Compares GPU benchmark results with a stored baseline of the same device; exit 1 when something regressed.

    python benchmarks/gpu_compare.py NEW/DEVICE --baseline benchmarks/results [--markdown FILE]

What is compared are ratios of things that took turns in one process (kernel over torch.compile, pruned over dense
engine, search step over plain step): milliseconds of another day, clock and temperature are not. A regression is a
ratio whose 95 % interval lies wholly below the baseline's by more than --margin, a budget that is no longer met, or a
case that worked and now fails or is not there (--partial: only what both have counts). "can't tell" is an answer and
fails nothing. Exit 0 nothing regressed (or there is no baseline of this device), 1 regression, 2 no such results.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu_sections.base import rows_in  # noqa: E402

Verdict = Literal["regressed", "improved", "same", "can't tell", "failed", "missing", "budget missed"]
FAILURES: tuple[Verdict, ...] = ("regressed", "failed", "missing", "budget missed")
MARGIN = 0.02
"""Two loads of one engine file differ by up to this much (`passdeploy.latency.measurement.RESOLUTION`)."""


@dataclass(frozen=True)
class Metric:
    """A ratio of which more is better.

    Attributes:
        value: None: the case failed.
        low: Lower end of its 95 % interval; 0 where unknown.
        high: Upper end; infinite where unknown.
        met: Whether its budget was met; None where it has none.
    """

    value: float | None
    low: float = 0.0
    high: float = math.inf
    met: bool | None = None

    @classmethod
    def of(cls, ratio: Mapping[str, Any] | None, *, inverse: bool = False, met: bool | None = None) -> Metric:
        """From a ratio as JSON; `inverse` for those of which less is better."""
        if not ratio or ratio.get("value") is None:
            return cls(None, met=met)
        value, low, high = ratio["value"], ratio.get("low"), ratio.get("high")
        low, high = 0.0 if low is None else low, math.inf if high is None else high
        if inverse:
            return cls(1 / value, 1 / high, 1 / low if low > 0 else math.inf, met)
        return cls(value, low, high, met)


def metrics(folder: Path) -> dict[str, Metric]:
    """Everything of a device's folder that can be compared, by name."""
    found: dict[str, Metric] = {}
    kernels = folder / "kernels.json"
    if kernels.exists():
        for name, case in json.loads(kernels.read_text())["cases"].items():
            for goal in ("times_compile", "times_eager"):
                found[f"{name}: {goal.replace('times_', 'over ')}"] = Metric.of(case[goal])
    for key, row in rows_in(folder, "engines").items():
        if "skipped" not in row:
            found[f"{key}: half as wide"] = Metric.of(row.get("speedup"))
    for key, row in rows_in(folder, "budgets").items():
        found[f"{key}: budget"] = Metric.of(row.get("speedup"), met=row.get("status") == "within_budget")
    for key, row in rows_in(folder, "search").items():
        found[f"{key}: step"] = Metric.of(row.get("step_ratio"), inverse=True)
    for key, row in rows_in(folder, "rtx").items():
        found[f"TensorRT-RTX {key}: runs"] = Metric(None if "error" in row else 1.0, 1.0, 1.0)
    return found


def judge(old: Metric, new: Metric, margin: float = MARGIN) -> Verdict:
    """What became of a metric.

    The interval of new over old is that of independent measurements at its widest: new's lower end over old's upper.
    """
    if old.value is None:
        return "can't tell" if new.value is None else "improved"
    if new.value is None:
        return "failed"
    if old.met and new.met is False:
        return "budget missed"
    low = new.low / old.high if math.isfinite(old.high) else 0.0
    high = new.high / old.low if old.low > 0 else math.inf
    if high < 1 - margin:
        return "regressed"
    if low > 1 + margin:
        return "improved"
    return "same" if low >= 1 - margin and high <= 1 + margin else "can't tell"


def compare(
    old: Mapping[str, Metric], new: Mapping[str, Metric], margin: float = MARGIN, partial: bool = False
) -> dict[str, Verdict]:
    """Verdicts on what the baseline has; cases that are new say nothing, nor, of a `partial` run, those left out."""
    lost: dict[str, Verdict] = {name: "missing" for name in old if name not in new and old[name].value is not None}
    both = {name: judge(old[name], new[name], margin) for name in new if name in old}
    return both if partial else both | lost


def _cell(metric: Metric | None) -> str:
    if metric is None:
        return ""
    if metric.value is None:
        return "failed"
    known = metric.low > 0 and math.isfinite(metric.high)
    return f"{metric.value:.3f}" + (f" ({metric.low:.3f} to {metric.high:.3f})" if known else "")


def page(device: str, old: Mapping[str, Metric], new: Mapping[str, Metric], verdicts: Mapping[str, Verdict]) -> str:
    """Markdown: a sentence, what regressed, the rest folded away."""
    count = {verdict: list(verdicts.values()).count(verdict) for verdict in sorted(set(verdicts.values()))}
    told = ", ".join(f"{number} {verdict}" for verdict, number in count.items()) or "nothing in common"
    head = "| case | baseline | now | verdict |\n| --- | --- | --- | --- |\n"
    rows = {
        name: f"| {name} | {_cell(old[name])} | {_cell(new.get(name))} | {verdict} |"
        for name, verdict in verdicts.items()
    }
    bad = [rows[name] for name, verdict in verdicts.items() if verdict in FAILURES]
    good = [rows[name] for name, verdict in verdicts.items() if verdict not in FAILURES]
    parts = [f"## {'❌ Regressed' if bad else '✅ No regression'} on {device}: {told}"]
    parts += [head + "\n".join(bad)] if bad else []
    parts += (
        [f"<details><summary>{len(good)} others</summary>\n\n{head}" + "\n".join(good) + "\n\n</details>"]
        if good
        else []
    )
    return "\n\n".join(parts) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="a device's folder, or a folder with one in it")
    parser.add_argument("--baseline", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--margin", type=float, default=MARGIN)
    parser.add_argument("--partial", action="store_true", help="the run was of some sections only")
    parser.add_argument("--markdown", type=Path, help="where the page is written, too")
    options = parser.parse_args(arguments)
    folders = [
        f.parent for f in sorted(options.results.glob("machine.json")) or sorted(options.results.glob("*/machine.json"))
    ]
    if len(folders) != 1:
        print(f"gpu_compare: {options.results}: expected results of one device, found {len(folders)}", file=sys.stderr)
        return 2
    (folder,) = folders
    device = json.loads((folder / "machine.json").read_text())["device"]
    stored = options.baseline / folder.name
    code = 0
    if (stored / "machine.json").exists():
        old, new = metrics(stored), metrics(folder)
        verdicts = compare(old, new, options.margin, options.partial)
        text = page(device, old, new, verdicts)
        code = int(any(verdict in FAILURES for verdict in verdicts.values()))
    else:
        text = f"## No baseline of {device}: nothing was compared\n\n"
        text += f"Commit {folder.name}/ to {options.baseline.name}/ to make it one.\n"
    if options.markdown is not None:
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        options.markdown.write_text(text)
    print(text)
    return code


if __name__ == "__main__":
    sys.exit(main())
