"""What the sections share: where rows go, which of them are there already, what the device is called."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def folder_name(device: str) -> str:
    """The folder of a device's results: ``NVIDIA H100 80GB HBM3`` -> ``nvidia-h100-80gb-hbm3``."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def rows_in(folder: Path, section: str) -> dict[str, Row]:
    """The rows of a section in a device's folder, the last one of every key."""
    path = folder / f"{section}.jsonl"
    found: dict[str, Row] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # cut off by an interruption; its case is done again
        found[row["key"]] = row
    return found


@dataclass
class Bench:
    """One run of the benchmarks on one device.

    Attributes:
        device: The GPU, as its driver names it.
        capability: Its compute capability, "9.0".
        target: Its name in passdeploy's catalogue; ``gpu`` when it is not there.
        folder: Where its rows lie.
        runs: Where whole runs of passdeploy lie, with their reports and bundles.
        quick: Fewer cases, fewer rounds: for CI and for a first look.
        data: What accuracies are measured on; None: generated pictures, whose accuracies mean nothing elsewhere.
        retry: Does failed cases again.
        say: Prints a line.
    """

    device: str
    capability: str
    target: str
    folder: Path
    runs: Path
    quick: bool = False
    data: str | None = None
    retry: bool = False
    say: Callable[[str], None] = field(default=lambda line: print(line, flush=True))

    def rows(self, section: str) -> list[Row]:
        """The rows of a section, the last one of every key."""
        return list(rows_in(self.folder, section).values())

    def case(self, section: str, key: str, take: Callable[[], Row]) -> None:
        """Adds the row of a case, unless it is there. What goes wrong is a row too: one case never stops the rest."""
        done = {row["key"]: row for row in self.rows(section)}
        before = done.get(key, {})
        # What was left out for want of a library is asked for again: it may have been installed since.
        if before and "skipped" not in before and not (self.retry and "error" in before):
            return
        begun = time.perf_counter()
        try:
            row = take()
        except Exception as error:
            row = failure(error)
        if "skipped" in row and row["skipped"] == before.get("skipped"):
            return
        row = {"key": key, **row, "seconds": round(time.perf_counter() - begun, 1)}
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{section}.jsonl"
        whole = not path.exists() or path.read_bytes()[-1:] in (b"", b"\n")
        with path.open("a") as file:  # never behind a row that was cut off: both would be lost
            file.write(("" if whole else "\n") + json.dumps(row) + "\n")
        self.say(f"{section}: {key}: {row.get('error') or told(row)}")


def failure(error: Exception) -> Row:
    """The row of a case that failed."""
    return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}


def told(row: Row) -> str:
    """A row in one line."""
    parts = []
    for name, value in row.items():
        if name in ("key", "seconds"):
            continue
        if isinstance(value, dict) and "value" in value:
            value = f"{value['value']:.3f}"
        if isinstance(value, (str, int, float, bool)) or value is None:
            parts.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
    return ", ".join(parts)
