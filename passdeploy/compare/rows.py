"""Rows of a comparison: one per method, budget, seed and split, appended as they come."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from passdeploy.errors import BadInput, NotWritten
from passdeploy.locking import in_turn
from passdeploy.workspace import write_json

SPLITS = ("validation", "test")


@dataclass(frozen=True)
class Row:
    """One result.

    Attributes:
        method: Or the name of a study's variant.
        data: Name of the data set.
        model: Name of the network.
        budget: As typed.
        axis: ``latency`` or ``macs``: what the budget is about.
        seed: Of the run.
        split: ``validation`` or ``test``: what the accuracy was measured on.
        status: As in a report; ``infeasible`` has no accuracy.
        accuracy: A share: top-1, or what `extra` calls ``metric``; below fp32 of what `extra` calls ``accuracy_of``.
        dense_accuracy: Of the dense network, on the same split.
        ratio: Measured latency of the dense engine over the thin one's, interleaved; None when not measured.
        ratio_ci95: Its interval.
        macs: Of the thin network, per image.
        dense_macs: Of the dense network.
        params: Of the thin network.
        seconds: Per stage.
        steps: Training steps of search and fine-tuning together.
        settings: Digest of all that the compared methods share: only rows of equal settings can be compared.
        device: The target's.
        inputs: Digest of network, data, versions and what measures (`Plan.inputs`): a row of others is run again.
            Empty: from before it was kept.
        own: Digest of the method and of what it alone depends on: a row of another is run again, and those of the other
            methods are not. Empty: from before it was kept.
        extra: What a study adds, and what the accuracy is where that is not a network's top-1.
    """

    method: str
    data: str
    model: str
    budget: str
    axis: str
    seed: int
    split: str
    status: str
    accuracy: float | None
    dense_accuracy: float
    ratio: float | None
    ratio_ci95: tuple[float, float] | None
    macs: float | None
    dense_macs: float
    params: int | None
    seconds: dict[str, float]
    steps: int | None
    settings: str
    device: str
    inputs: str = ""
    own: str = ""
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def key(self) -> tuple[Any, ...]:
        """What is the same when the same thing is run again."""
        what = (self.method, self.data, self.model, self.budget, self.axis)
        return (*what, self.seed, self.split, self.settings, self.inputs, self.device, self.own)

    @property
    def reduction(self) -> float | None:
        """How many times fewer MACs than the dense network."""
        return None if not self.macs else self.dense_macs / self.macs

    def to_json(self) -> dict[str, Any]:
        """JSON-able."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Row:
        """What `to_json` wrote."""
        interval = data.get("ratio_ci95")
        return cls(**{**data, "ratio_ci95": tuple(interval) if interval else None})


class RowFile:
    """Rows on disk: a JSON list (``.json``), or a line each (``.jsonl``). The last of a key counts.

    Args:
        path: Created with the first row.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def _entries(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        try:
            text = self.path.read_text(encoding="utf-8")
            if self.path.suffix == ".json":
                return list(json.loads(text))
            return [json.loads(line) for line in _whole_lines(text).splitlines() if line.strip()]
        except (OSError, ValueError) as error:
            raise BadInput(f"{self.path}: cannot be read as rows of a comparison ({error}); move it away") from None

    def read(self) -> list[Row]:
        """All rows, each where it stands last: what was run again is new."""
        try:
            rows = [Row.from_json(entry) for entry in self._entries()]
        except (TypeError, AttributeError) as error:
            raise BadInput(f"{self.path}: not rows of a comparison ({error}); move it away") from None
        last: dict[tuple[Any, ...], Row] = {}
        for row in rows:
            last.pop(row.key, None)
            last[row.key] = row
        return list(last.values())

    def append(self, rows: Iterable[Row]) -> None:
        """Adds rows; other processes may do so meanwhile. Raises `NotWritten` when the disk takes them not."""
        new = [row.to_json() for row in rows]
        with in_turn(self.path):
            self._append(new)

    def _append(self, new: list[dict[str, Any]]) -> None:
        if self.path.suffix == ".json":
            write_json(self.path, self._entries() + new)
            return
        text = "".join(json.dumps(entry, allow_nan=False) + "\n" for entry in new)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+") as file:
                file.seek(0)
                os.truncate(file.fileno(), len(_whole_lines(file.read()).encode()))
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise NotWritten(f"{self.path}: cannot be written ({error.strerror}); free some space") from None


def _whole_lines(text: str) -> str:
    """Without a last line that a kill cut off while it was written: its run is simply looked up again."""
    return text[: text.rfind("\n") + 1]
