"""Imports what NVIDIA's ``trtexec --exportTimes=FILE`` writes, so that such a measurement stands in the same report."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from passdeploy.errors import BadInput
from passdeploy.reporting.engines import Imported, Latency
from passdeploy.reporting.fields import ranked_samples
from passdeploy.reporting.schema import Report

Scope = Literal["engine", "end_to_end"]


def read_trtexec(path: Path, label: str | None = None, scope: Scope = "engine") -> Imported:
    """Reads the list of calls that ``trtexec --exportTimes`` wrote.

    Args:
        path: The JSON file: one object per call with start and end times of transfers and compute, in ms.
        label: Of the row in the report; the file's name when None.
        scope: ``engine`` takes the GPU's compute time, ``end_to_end`` trtexec's latency (transfers included).

    Raises:
        BadInput: It is no such file.
    """
    from passdeploy.latency.stats import percentile, spread

    try:
        calls = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: cannot be read as trtexec's --exportTimes JSON ({error})") from None
    if not isinstance(calls, list) or not calls:
        raise BadInput(f"{path}: not what trtexec --exportTimes writes: a list of calls is expected")
    samples = [_call_ms(call, index, path, scope) for index, call in enumerate(calls)]
    enqueue = [value for call in calls if (value := _between(call, "Enq")) is not None]
    latency = Latency(
        p50=percentile(samples, 50),
        p90=percentile(samples, 90),
        p99=percentile(samples, 99),
        mean=math.fsum(samples) / len(samples),
        n=len(samples),
        spread=spread(samples),
        enqueue_ms=sorted(enqueue)[len(enqueue) // 2] if enqueue else None,
    )
    return Imported(
        label=label or path.name,
        source="trtexec --exportTimes",
        scope=scope,
        latency_ms=latency,
        samples=ranked_samples(samples),
    )


def attach(reports: Sequence[Report], files: Sequence[Path]) -> list[Report]:
    """The report with trtexec's measurements beside its own, in the scope of its budget.

    Args:
        reports: Exactly one when there are files: it has to be clear which report they belong to.
        files: What ``trtexec --exportTimes`` wrote.

    Raises:
        BadInput: Several reports, or a file that is none of trtexec's.
    """
    if not files:
        return list(reports)
    if len(reports) != 1:
        raise BadInput(f"--trtexec: give one run that the measurements stand beside, not {len(reports)}")
    imported = [read_trtexec(Path(file), scope=reports[0].budget.scope) for file in files]
    return [reports[0].model_copy(update={"imported": [*(reports[0].imported or []), *imported]})]


def _between(call: Any, part: str) -> float | None:
    if not isinstance(call, dict):
        return None
    start, end = call.get(f"start{part}Ms"), call.get(f"end{part}Ms")
    if isinstance(start, int | float) and isinstance(end, int | float):
        return float(end - start)
    return None


def _call_ms(call: Any, index: int, path: Path, scope: Scope) -> float:
    """One call's time: its own field, else from start to end (trtexec renamed the transfers from In and Out)."""
    key = "computeMs" if scope == "engine" else "latencyMs"
    value = call.get(key) if isinstance(call, dict) else None
    if value is None and scope == "engine":
        value = _between(call, "Compute")
    elif value is None:
        parts = [part for names in (("H2d", "In"), ("Compute",), ("D2h", "Out")) for part in [_first(call, names)]]
        value = None if None in parts else sum(part for part in parts if part is not None)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise BadInput(f"{path}: call {index} has no usable {key}; trtexec --exportTimes writes it for every call")
    return float(value)


def _first(call: Any, names: tuple[str, ...]) -> float | None:
    return next((value for name in names if (value := _between(call, name)) is not None), None)
