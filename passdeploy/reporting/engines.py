"""Sections of `report.json` about engines: a latency, and what stands beside the dense and the pruned one."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from passdeploy.reporting.fields import MAX_SAMPLES, Interval, Number, Section, Share


class Latency(Section):
    """One engine's latency per call, in ms. A percentile is null where there are too few samples to say."""

    p50: Number
    p90: Number
    p99: Number
    mean: Number
    n: int = Field(ge=0)
    spread: Number = Field(default=None, description="Relative spread between blocks of calls.")
    disturbed_blocks: int | None = Field(default=None, description="Blocks that were marked disturbed and repeated.")
    enqueue_ms: Number = Field(default=None, description="Host-side enqueue time of one call (GPU).")


class LayerLatency(Section):
    """What one part of the network costs in both engines, by the runtime's profiler."""

    name: str = Field(description="Path of the module or block.")
    dense_ms: float = Field(ge=0)
    pruned_ms: float = Field(ge=0, description="0: nothing of it is left.")


class Imported(Section):
    """A measurement that another tool made, such as ``trtexec --exportTimes``."""

    label: str
    source: str
    scope: Literal["engine", "end_to_end"]
    latency_ms: Latency
    samples: list[float] = Field(default_factory=list, max_length=MAX_SAMPLES)


class MaskedInfo(Section):
    """The masked network compiled as it is (`compile --masked`), beside the dense and the thin engine, interleaved."""

    kernel: bool = Field(description="Masked by the CUDA kernel's operator; else by plain multiplications.")
    masked_vs_thin: float = Field(ge=0, description="max|a-b| / max|a| between the outputs of the two.")
    dense: Latency | None
    masked: Latency | None
    thin: Latency | None
    speedup: Number = Field(default=None, description="Of the masked engine over the dense one.")
    speedup_ci95: Interval = None
    thin_speedup: Number = Field(default=None, description="Of the thin engine over the dense one.")


class Alternative(Section):
    """The dense network in a lower precision, by the same backend on the same target."""

    precision: str
    reason: str | None = Field(default=None, description="Why there is no engine; null: there is one.")
    engine_bytes: int | None = Field(default=None, ge=0)
    accuracy: Share = None
    accuracy_of: Literal["engine", "graph"] | None = Field(
        default=None, description="What the accuracy was measured on; graph: what the engine is built from."
    )
    latency_ms: Latency | None = Field(default=None, description="Null when nothing was measured.")
    speedup: Number = Field(default=None, description="Over the dense engine in the run's own precision, interleaved.")
    speedup_ci95: Interval = None
    meets_budget: bool | None = Field(
        default=None, description="Its latency, judged as the pruned engine's is; null when it was not measured."
    )


class Alternatives(Section):
    """What one would do instead of pruning (configuration key `alternatives`)."""

    dense_latency_ms: Latency | None = Field(
        default=None, description="Of the dense engine in the run's precision, timed in turns with these."
    )
    dense_bytes: int | None = Field(default=None, ge=0, description="Size of the dense engine in the run's precision.")
    pruned_bytes: int | None = Field(default=None, ge=0, description="Size of the engine that ships.")
    precisions: list[Alternative]
