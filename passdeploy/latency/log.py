"""The log of measurements: what was measured once is never measured again, and never decided twice.

Measurements are inputs of a run. They are appended to a file, one JSON record a line, each made durable before it is
used; a run that is resumed gets the logged values back in the order in which they came, and so decides what the
undisturbed run would have decided.
"""

from __future__ import annotations

import csv
import io
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from passdeploy.errors import BadInput, DenseFailed, NotWritten
from passdeploy.workspace import write_atomic

Value = dict[str, Any]


@dataclass(frozen=True)
class Record:
    """One logged measurement.

    Attributes:
        purpose: What it was for: "profile", "fit", "bench", ...
        digest: Of the structure that was measured.
        target: Key of the target (hardware, backend, settings).
        repeat: How many times the same thing had been measured for the same purpose before.
        value: What the measurement returned.
        seconds: How long it took, compile included: time budgets count these, so that a resumed run stops where the
            undisturbed one did.
    """

    purpose: str
    digest: str
    target: str
    repeat: int
    value: Value
    seconds: float

    @property
    def key(self) -> tuple[str, str, str, int]:
        """What identifies it."""
        return self.purpose, self.digest, self.target, self.repeat


class MeasurementLog:
    """Append-only log with replay; kept in memory only when `path` is None.

    Raises:
        BadInput: A line other than the last can't be read (a torn last line is what a crash leaves; it is dropped).
    """

    def __init__(self, path: Path | None = None, clock: Callable[[], float] = time.perf_counter) -> None:
        self.path = path
        self._clock = clock
        self._records: dict[tuple[str, str, str, int], Record] = {}
        self._repeats: Counter[tuple[str, str, str]] = Counter()
        self.replayed = 0
        self.measured = 0
        self._keep = 0
        if path is not None and path.exists():
            self._read(path)

    def _read(self, path: Path) -> None:
        data = path.read_bytes()
        lines = data.split(b"\n")
        for number, line in enumerate(lines, 1):
            torn = number == len(lines)  # a complete file ends in a newline, so that the last piece is empty
            if torn:
                break
            try:
                record = Record(**json.loads(line))
            except (ValueError, TypeError):
                if number == len(lines) - 1:  # a block that was never flushed reads as zeros, newline or not
                    break
                raise BadInput(
                    f"{path}: line {number} is not a logged measurement; remove the file to measure again"
                ) from None
            self._records[record.key] = record
            self._keep += len(line) + 1

    def _append(self, record: Record) -> None:
        self._records[record.key] = record
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = (json.dumps(vars(record), sort_keys=True, allow_nan=False) + "\n").encode()
        with self.path.open("ab") as file:
            if file.tell() > self._keep:  # behind the last good record lies what a crash left
                file.truncate(self._keep)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._keep += len(line)

    def measure(self, purpose: str, digest: str, target: str, take: Callable[[], Mapping[str, Any]]) -> Record:
        """The next measurement of `digest` for `purpose`: replayed if it was logged, else taken and logged.

        `take` returns a JSON-able mapping. What it raises passes through, and nothing is logged.
        """
        repeat = self._repeats[purpose, digest, target]
        self._repeats[purpose, digest, target] += 1
        record = self._records.get((purpose, digest, target, repeat))
        if record is not None:
            self.replayed += 1
            return record
        start = self._clock()
        try:
            value = dict(take())
        except BaseException:
            self._repeats[purpose, digest, target] -= 1
            raise
        # Through JSON once, so that the first run sees exactly what a replay would.
        value = json.loads(json.dumps(value))
        record = Record(purpose, digest, target, repeat, value, round(self._clock() - start, 6))
        self._append(record)
        self.measured += 1
        return record

    @property
    def records(self) -> tuple[Record, ...]:
        """All records, in the order in which they were logged."""
        return tuple(self._records.values())


def write_csv(records: Iterable[Record], path: Path) -> None:
    """`measurements.csv`: one row a record; nested values are flattened with dots, lists left out."""
    rows = []
    for record in records:
        row: dict[str, Any] = {k: v for k, v in vars(record).items() if k != "value"}
        row.update(_flat(record.value))
        rows.append(row)
    columns = list(dict.fromkeys(k for row in rows for k in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns or ["purpose", "digest", "target", "repeat", "seconds"])
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue())


def attempt(take: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
    """What `take` returns, or ``{"failed": why}`` where it raises `BadInput`.

    For `MeasurementLog.measure`: what does not compile is logged like anything else that was found out, so that it is
    not met again by every resumed run. A full disk, or a dense engine that fails, says nothing of what was measured,
    and is raised.
    """
    try:
        return take()
    except (NotWritten, DenseFailed):
        raise
    except BadInput as error:
        return {"failed": str(error)}


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            flat.update(_flat(item, f"{prefix}{key}."))
        elif not isinstance(item, list | tuple):
            flat[f"{prefix}{key}"] = item
    return flat
