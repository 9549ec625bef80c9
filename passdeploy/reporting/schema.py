"""`report.json`: what one run claims, and everything its pages are drawn from.

The keys of `Report` up to `environment` are the contract (schema id ``passdeploy.report/1``): always present, ``null``
where there is nothing to say. The sections after it are optional. The published JSON Schema is generated from these
models (`passdeploy.reporting.files.json_schema`); within schema 1 keys are only ever added, so readers ignore what they
don't know.

Numbers are finite or ``null``: a NaN or an infinity that is handed in becomes ``null`` where ``null`` is allowed and is
refused elsewhere. Latencies are milliseconds, times are seconds, accuracies lie in [0, 1].
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from passdeploy.reporting.engines import Alternatives, Imported, Latency, LayerLatency, MaskedInfo
from passdeploy.reporting.fields import MAX_SAMPLES, Interval, Number, Section, Share, ranked_samples

SCHEMA_ID = "passdeploy.report/1"

Status = Literal["within_budget", "over_budget", "infeasible", "unverified", "not_equivalent", "accuracy_below_floor"]


class TargetInfo(Section):
    """The hardware and run-time settings that the latencies are about (`passdeploy.targets.Target`)."""

    name: str
    device: str
    compute_capability: str | None = None
    backend: str
    precision: str
    batch: int = Field(ge=1)
    threads: int = Field(ge=0)
    attached: bool


class BudgetInfo(Section):
    """What was asked. `latency_ms` is the asked speed-up turned into time when `asked` is one, at `percentile`."""

    asked: str
    latency_ms: Number
    percentile: str = "p50"
    scope: Literal["engine", "end_to_end"] = "engine"
    min_accuracy: Share = None
    judged_accuracy: Share = Field(
        default=None, description="Of what ships, on validation images: what `min_accuracy` was held against."
    )


class NetworkInfo(Section):
    """A network: accuracy on the test data, cost, and the latency of its engine (null when nothing was measured)."""

    accuracy: Share
    macs: float = Field(ge=0)
    params: float = Field(ge=0)
    latency_ms: Latency | None


class Speedup(Section):
    """Dense over pruned. `realisation` is latency speed-up / MACs speed-up."""

    latency: Number
    latency_ci95: Interval
    macs: Number
    realisation: Number
    processes: list[float] | None = Field(
        default=None, description="What each fresh process measured: `latency` is their median."
    )


class PredictorInfo(Section):
    """The latency model that steered the search, with its error (relative) on structures it was not fitted on."""

    kind: Literal["measured", "profile", "analytic"]
    mape: Number
    max_ape: Number
    n: int = Field(ge=0)
    repeatability: Number


class Equivalence(Section):
    """``max|a-b| / max|a|`` of each step on real images; null where a step was not checked."""

    masked_vs_thin: Number
    thin_vs_onnx: Number
    onnx_vs_engine: Number
    top1_agreement: Share
    tolerance: Number = Field(default=None, description="The bound of this precision; 1e-4 in fp32.")
    images: int | None = Field(default=None, description="How many images were compared.")
    agreement_images: int | None = Field(default=None, description="How many `top1_agreement` is the share of.")


class Environment(Section):
    """The machine that ran it."""

    cpu: str | None
    gpu: str | None
    driver: str | None
    versions: dict[str, str]
    settings: dict[str, str] = Field(
        default_factory=dict, description="Clocks, temperature, environment variables, ..."
    )


class GroupInfo(Section):
    """One channel group (`kept` of `units`) or residual block (`kind` depth, one unit)."""

    name: str
    kind: Literal["channel", "depth"]
    units: int = Field(ge=1)
    kept: int = Field(ge=0)
    members: list[str] = Field(default_factory=list)
    share_macs: Share = Field(default=None, description="Of the dense network's MACs.")
    share_latency: Share = Field(default=None, description="Of the dense engine's latency.")
    frozen: str | None = Field(default=None, description="Why it was not prunable, if it was not.")

    @model_validator(mode="after")
    def _kept_fits(self) -> Self:
        if self.kept > self.units:
            raise ValueError(f"group {self.name!r} keeps {self.kept} of {self.units} units")
        return self


class Distribution(Section):
    """Samples of single calls in ms, at most 500 each; build it with `Distribution.of`."""

    dense: list[float] = Field(max_length=MAX_SAMPLES)
    pruned: list[float] = Field(max_length=MAX_SAMPLES)

    @classmethod
    def of(cls, dense: Iterable[float], pruned: Iterable[float]) -> Distribution:
        """Keeps at most 500 evenly ranked samples of each, the smallest and the largest among them."""
        return cls(dense=ranked_samples(dense), pruned=ranked_samples(pruned))


class PromptInfo(Section):
    """The learnt visual prompt. Pictures are ``data:image/png;base64,...`` URIs (`passdeploy.reporting.picture`)."""

    kind: Literal["none", "additive", "expansive"]
    width: int = Field(ge=0, description="Border in pixels; 0 of an additive prompt means the whole image.")
    size: tuple[int, int] = Field(description="Height and width of the network's input.")
    png: str | None = Field(default=None, pattern=r"^data:image/png;base64,[A-Za-z0-9+/=]+$")
    example_png: str | None = Field(default=None, pattern=r"^data:image/png;base64,[A-Za-z0-9+/=]+$")
    largest: Number = Field(default=None, description="Largest absolute value, in units of the normalised input.")
    accuracy_with: Share = Field(default=None, description="Of the shipped network, on validation images.")
    accuracy_without: Share = None


class Curve(Section):
    """Values over the steps of a stage: every series is as long as `step`, null where nothing was recorded.

    Names that the pages know: loss, accuracy, latency_ratio (predicted, of the dense engine), kept_blocks, kept_share.
    """

    unit: str = "step"
    step: list[float]
    series: dict[str, list[Number]]

    @model_validator(mode="after")
    def _lengths_match(self) -> Self:
        for name, values in self.series.items():
            if len(values) != len(self.step):
                raise ValueError(f"series {name!r} has {len(values)} values for {len(self.step)} steps")
        return self


class Curves(Section):
    """What the search and the fine-tuning looked like from inside."""

    search: Curve | None = None
    finetune: Curve | None = None


class HealthCheck(Section):
    """One thing that was watched during the search."""

    name: str
    ok: bool
    message: str


class Candidate(Section):
    """One turn of the fit loop. Ratios are latency / dense latency: below 1 is faster."""

    asked_ms: Number = None
    predicted_ratio: Number
    measured_ratio: Number
    accuracy: Share = None
    chosen: bool = False


class Reason(Section):
    """Why fewer MACs did not turn into the same speed-up; `share` is its part of the pruned engine's latency."""

    text: str
    share: Share = None
    value: Number = None
    unit: str | None = None


class AccuracyPoint(Section):
    """A point of the accuracy-latency plane. Kind `alternative` is what a user would do instead (dense int8, ...)."""

    label: str
    kind: Literal["dense", "before_finetune", "pruned", "alternative", "imported"] = "alternative"
    accuracy: Share
    latency_ms: Number
    macs: Number = None


class Split(Section):
    """Images of a split and what they were used for."""

    images: int = Field(ge=0)
    used_for: str | None = None


class Provenance(Section):
    """What is needed to run it again and to tell whether a file is the one that was measured."""

    command: str | None = None
    created: str | None = Field(default=None, description="ISO 8601, UTC.")
    commit: str | None = None
    model: str | None = None
    data: str | None = None
    metric: str = "top-1 accuracy"
    config_sha256: str | None = None
    splits: dict[str, Split] = Field(default_factory=dict)
    engine: str | None = Field(default=None, description="Path of the engine within the run's folder.")
    engine_sha256: str | None = None


class Predicted(Section):
    """What the latency model says where nothing was measured. Never a claim about the hardware."""

    dense_ms: Number = None
    pruned_ms: Number = None
    speedup: Number = None


class Reachable(Section):
    """The fastest structure found for an infeasible budget."""

    latency_ms: Number
    speedup: Number
    measured: bool


class BudgetResult(Section):
    """A sibling budget that was served by the same search."""

    asked: str
    status: Status
    accuracy: Share = None
    latency_ms: Number = None
    speedup: Number = None
    # Browsers take a backslash for a slash, and leave spaces at the beginning out.
    path: str | None = Field(default=None, pattern=r"^[^:/\\\s][^:\\]*$", description="Relative, of its report.html.")


class RebuildsInfo(Section):
    """How far builds of the graph that ships lie apart, or loads of its engine where builds do not differ."""

    of: Literal["builds", "loads"] | None = Field(default=None, description="What was repeated; null: nothing.")
    n: int = Field(default=0, ge=0, description="How many were timed in turns, the engine that ships included.")
    spread: float | None = Field(default=None, ge=0, description="(Slowest - fastest) / median of their latencies.")
    latency_ms: list[float] = Field(default_factory=list, description="Of each, the engine that ships first.")
    reason: str | None = Field(default=None, description="Why nothing was measured.")


class Report(Section):
    """One run at one budget."""

    schema_: Literal["passdeploy.report/1"] = Field(default="passdeploy.report/1", alias="schema")
    status: Status
    target: TargetInfo
    budget: BudgetInfo
    method: str
    seed: int
    dense: NetworkInfo
    pruned: NetworkInfo | None
    speedup: Speedup
    predictor: PredictorInfo | None
    equivalence: Equivalence
    timing_s: dict[str, float]
    environment: Environment

    groups: list[GroupInfo] | None = None
    frozen: dict[str, str] | None = Field(
        default=None, description="Modules (or `depth`: all residual blocks) that stay whole, with the reason."
    )
    distribution: Distribution | None = None
    prompt: PromptInfo | None = None
    curves: Curves | None = None
    health: list[HealthCheck] | None = None
    candidates: list[Candidate] | None = None
    why_not_faster: list[Reason] | None = None
    messages: list[str] | None = None
    accuracy_points: list[AccuracyPoint] | None = None
    provenance: Provenance | None = None
    predicted: Predicted | None = None
    reachable: Reachable | None = None
    budgets: list[BudgetResult] | None = None
    imported: list[Imported] | None = None
    masked: MaskedInfo | None = None
    rebuilds: RebuildsInfo | None = None
    alternatives: Alternatives | None = None
    layers: list[LayerLatency] | None = None

    @model_validator(mode="after")
    def _claims_are_backed(self) -> Self:
        """A latency stands in a report only when it was measured, and a verdict about one only when it is there."""
        measured = [network and network.latency_ms for network in (self.dense, self.pruned)]
        others: list[Latency | None] = []
        if self.alternatives is not None:
            others = [self.alternatives.dense_latency_ms, *(o.latency_ms for o in self.alternatives.precisions)]
        claims: list[object] = [*measured, *others, self.speedup.latency is not None, bool(self.layers)]
        claims += [point.latency_ms is not None for point in self.accuracy_points or [] if point.kind != "imported"]
        if self.masked is not None:
            claims += [self.masked.dense, self.masked.masked, self.masked.thin, self.masked.speedup is not None]
        if not self.target.attached and any(claims):
            raise ValueError("the target is not attached: latencies and speedup.latency must be null")
        if self.status == "unverified" and self.speedup.latency is not None:
            raise ValueError("status unverified goes with no measured speed-up: speedup.latency must be null")
        if self.status in ("within_budget", "over_budget") and not all(measured):
            raise ValueError(f"status {self.status} needs measured latencies of both engines")
        return self

    @property
    def goal_met(self) -> bool:
        """Whether the run ends with exit status 0."""
        return self.status in ("within_budget", "unverified")

    def to_json(self) -> dict[str, Any]:
        """JSON-able; optional sections that are absent are left out."""
        data = self.model_dump(mode="json", by_alias=True)
        contract = list(type(self).model_fields).index("environment")
        optional = list(type(self).model_fields)[contract + 1 :]
        return {key: value for key, value in data.items() if not (key in optional and value is None)}
