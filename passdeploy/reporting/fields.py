"""What the report's models are made of: numbers that JSON can hold, shares, intervals, samples."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

MAX_SAMPLES = 500


def _finite(value: Any) -> Any:
    """None for what JSON can't write."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _finite_pair(value: Any) -> Any:
    """None for an interval with an open end."""
    open_ended = isinstance(value, (tuple, list)) and any(_finite(end) is None for end in value)
    return None if open_ended else value


Interval = Annotated[tuple[float, float] | None, BeforeValidator(_finite_pair)]
Number = Annotated[float | None, BeforeValidator(_finite)]
Share = Annotated[Annotated[float, Field(ge=0, le=1)] | None, BeforeValidator(_finite)]


class Section(BaseModel):
    """Base of all parts: unknown keys and non-finite numbers are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, populate_by_name=True)


def ranked_samples(samples: Iterable[float], limit: int = MAX_SAMPLES) -> list[float]:
    """At most `limit` evenly ranked values, ascending, to five significant digits; non-finite ones are dropped."""
    ranked: Sequence[float] = sorted(float(value) for value in samples if math.isfinite(value))
    if len(ranked) > limit:
        ranked = [ranked[round(i * (len(ranked) - 1) / (limit - 1))] for i in range(limit)]
    return [float(f"{value:.5g}") for value in ranked]
