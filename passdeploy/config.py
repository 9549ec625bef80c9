"""The one schema behind command-line flags, the YAML file and the Python API."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from passdeploy.budget import FASTEST, parse_budgets
from passdeploy.errors import BadInput, nearest

DEFAULT_FILE = "passdeploy.yaml"
DEMO = {"model": "resnet20", "data": "fashion-mnist"}
"""What `run` takes when it is given no model, data or config file."""

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def _kinds(annotation: object) -> set[object]:
    """The types in an annotation such as ``Positive | None``."""
    if get_origin(annotation) in (Annotated, Union, UnionType):
        return set().union(*map(_kinds, get_args(annotation)))
    return {annotation} if isinstance(annotation, type) else set()


class Section(BaseModel):
    """A part of the configuration; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_number(cls, value: object, info: ValidationInfo) -> object:
        """YAML reads a bare yes or on as true, which would count as 1."""
        kinds = _kinds(cls.model_fields[str(info.field_name)].annotation)
        if isinstance(value, bool) and kinds & {int, float} and bool not in kinds:
            raise PydanticCustomError("number", "must be a number")
        return value


class PromptConfig(Section):
    """The visual prompt.

    Attributes:
        kind: ``additive`` adds pixels, ``expansive`` shrinks the image and learns the border, ``none``.
        width: Border in pixels; for ``additive``, 0 means the whole image.
        lr: Adam's rate for the prompt during the search; fine-tuning uses the weights' optimiser.
    """

    kind: Literal["additive", "expansive", "none"] = "additive"
    width: int = Field(default=0, ge=0)
    lr: NonNegative = 3e-3


class SearchConfig(Section):
    """The search stage.

    Attributes:
        epochs: Passes over the training data.
        min_steps: At least this many steps, for small data.
        lr: Peak rate of the co-adapting weights.
        hyper_lr: Adam's rate for the hypernetwork.
        prior: What the scores start from: ``sensitivity`` (measured loss of removing units and blocks) or ``none``.
        co_adapt: Whether the weights train during the search.
        depth: Whether whole residual blocks are units.
        recurrence: Whether the LSTM's state is carried from group to group.
        statistics: Whether the hypernetwork sees weight statistics.
        memory: Which earlier masks it sees: the previous group's, or the mean over all of them.
        allocator: ``latency`` (joint, on predicted latency), ``global`` (one threshold, as in the paper) or
            ``uniform``.
        signal: What the hypernetwork learns from: ``measured`` (what small changes of the masks do to the loss), or
            ``gradient`` (of the loss, straight through the masks, as in the paper).
        latency_weight: Weight of the expected-latency term beside the gradient.
        trials: Sets of blocks that are tried at the start of the search, with a little training each (fewer where steps
            are few); 1, and where weights do not co-adapt: scores alone decide which blocks go.
        ramp: Share of the steps over which the budget tightens; trials begin within it.
        resolve_every: Steps between two solutions of the allocation.
        hyper_every: Steps between two updates of the hypernetwork.
        temperature: Of the soft masks behind the straight-through estimator.
        distill: Weight of matching the dense network's outputs.
        keep_at_least: No group falls below this share of its units.
    """

    epochs: Positive = 0.75
    min_steps: int = Field(default=150, ge=1)
    lr: NonNegative = 0.05
    hyper_lr: NonNegative = 5e-3
    prior: Literal["sensitivity", "none"] = "sensitivity"
    co_adapt: bool = True
    depth: bool = True
    recurrence: bool = True
    statistics: bool = True
    memory: Literal["previous", "all"] = "previous"
    allocator: Literal["latency", "global", "uniform"] = "latency"
    signal: Literal["measured", "gradient"] = "measured"
    latency_weight: NonNegative = 0.1
    trials: int = Field(default=6, ge=1)
    ramp: float = Field(default=0.6, ge=0, le=1)
    resolve_every: int = Field(default=8, ge=1)
    hyper_every: int = Field(default=8, ge=1)
    temperature: Positive = 0.5
    distill: float = Field(default=0.5, ge=0, le=1)
    keep_at_least: float = Field(default=0.1, ge=0, le=1)

    TRAINING: ClassVar[tuple[str, ...]] = (
        "lr", "hyper_lr", "co_adapt", "recurrence", "statistics", "memory", "signal", "latency_weight", "trials",
        "ramp", "resolve_every", "hyper_every", "temperature", "distill",
    )  # fmt: skip
    """Settings that only a search that trains depends on: PASS and its variants."""


class FinetuneConfig(Section):
    """Fine-tuning of the thin network's weights and prompt; `epochs` is the top-level one."""

    min_steps: int = Field(default=150, ge=1)
    lr: NonNegative = 0.05
    weight_decay: NonNegative = 5e-4
    distill: float = Field(default=0.5, ge=0, le=1)


class DenseConfig(Section):
    """Training of the dense network, when no weights are given."""

    epochs: Positive | None = None
    min_steps: int = Field(default=300, ge=1)
    lr: NonNegative = 0.1


class ProfileConfig(Section):
    """How the latency model is fitted.

    Attributes:
        seconds: Time for measuring structures.
        structures: At most this many.
        cache: ``use`` the latency model that this machine has of the same network, target and backend version, if
            any; ``refresh``: measure again and keep that; ``off``: neither. The steps in width likewise.
    """

    seconds: Positive = 30.0
    structures: int = Field(default=120, ge=9)
    cache: Literal["use", "refresh", "off"] = "use"

    @field_validator("cache", mode="before")
    @classmethod
    def _off(cls, value: object) -> object:
        return "off" if value is False else value  # YAML reads a bare off as false


class GroupsConfig(Section):
    """What may be pruned.

    Attributes:
        exclude: Module names or patterns (``layer1.*``) that stay whole.
        min_width: By module name or pattern, the channels (an attention's: heads) that must be left.
        fixed: By module name or pattern, the channels that the pruned network must have.
        tie: Sets of names or patterns whose layers keep the same channels.
    """

    exclude: tuple[str, ...] = ()
    min_width: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    fixed: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    tie: tuple[tuple[str, ...], ...] = ()


class RunConfig(Section):
    """Everything a run depends on. `None` means: choose the default.

    `latency` ``fastest`` with `min_accuracy` (on the validation split): the fastest structure that keeps it.

    `alternatives`: the dense network in lower precisions (fp16, int8, ...) stands in the report beside the pruned one.

    `axis` ``macs``: budgets such as ``2x`` are in multiply-accumulates, as in papers; nothing is measured on the way.
    """

    model: str | None = None
    weights: str | None = None
    data: str | None = None
    task: str | None = None
    input_size: tuple[int, int] | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[Positive, Positive, Positive] | None = None
    target: str = "cpu"
    backend: str | None = None
    precision: Literal["fp32", "fp16", "bf16", "int8", "fp8"] | None = None
    batch: int = Field(default=1, ge=1)
    threads: int = Field(default=1, ge=1)
    latency: tuple[str, ...] = ("2x",)
    percentile: Literal["p50", "p90", "p99"] = "p50"
    scope: Literal["engine", "end_to_end"] = "engine"
    axis: Literal["latency", "macs"] = "latency"
    method: str = "pass"
    epochs: Positive | None = None
    train_batch: int = Field(default=128, ge=2)
    seed: int = Field(default=0, ge=0, le=2**32 - 1)
    profile_file: str | None = None
    require_measured: bool = False
    min_accuracy: float | None = Field(default=None, ge=0, le=1)
    alternatives: bool = True
    groups: GroupsConfig = GroupsConfig()
    prompt: PromptConfig = PromptConfig()
    profile: ProfileConfig = ProfileConfig()
    search: SearchConfig = SearchConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    dense: DenseConfig = DenseConfig()

    @field_validator("weights", "data", "profile_file", mode="before")
    @classmethod
    def _path(cls, value: object) -> object:
        return str(value) if isinstance(value, Path) else value

    @field_validator("latency", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        parts = value if isinstance(value, list | tuple) else str(value).split(",")
        return tuple(str(part).strip() for part in parts)  # of YAML's 5 it is said later that the unit is missing

    def finetune_epochs(self) -> float:
        """Passes of fine-tuning."""
        return 2.25 if self.epochs is None else self.epochs

    def dense_epochs(self) -> float:
        """Passes of dense training, when it is needed."""
        return self.dense.epochs or 5 * self.finetune_epochs()

    def to_json(self) -> dict[str, Any]:
        """JSON-able, round-trips through `make_config`."""
        data: dict[str, Any] = self.model_dump(mode="json")
        return data


def _known_keys(location: tuple[Any, ...]) -> list[str]:
    model: type[BaseModel] = RunConfig
    for part in location[:-1]:
        field = model.model_fields.get(str(part))
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            return []
        model = field.annotation
    return list(model.model_fields)


def _given(model: type[BaseModel], values: dict[str, Any]) -> dict[str, Any]:
    """Without the keys that are None, which asks for the default: a YAML key with nothing behind it, for instance."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        field = model.model_fields.get(key)
        if value is None and field is not None:
            continue
        kind = None if field is None else field.annotation
        nested = isinstance(value, dict) and isinstance(kind, type) and issubclass(kind, BaseModel)
        found[key] = _given(kind, value) if nested else value  # type: ignore[arg-type]
    return found


def make_config(values: dict[str, Any], origin: str = "configuration", flags: Container[str] = ()) -> RunConfig:
    """Validates values (nested dictionaries as in the YAML file).

    Args:
        values: The configuration.
        origin: Where it was found, for errors.
        flags: Keys that were given on the command line: errors name the flag instead.

    Raises:
        BadInput: One line naming the first offending key, with the nearest known ones.
    """
    try:
        config = RunConfig.model_validate(_given(RunConfig, values))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            hint = nearest(str(first["loc"][-1]), _known_keys(first["loc"]))
            raise BadInput(f"{origin}: unknown key {key!r}{hint}") from None
        where = f"--{key.replace('_', '-')}" if key in flags else f"{origin}: {key}"
        if first["type"] == "tuple_type" and isinstance(first["input"], str | int | float):
            example = ", ".join([str(first["input"])] * {"input_size": 2, "mean": 3, "std": 3}.get(key, 1))
            raise BadInput(f"{where}: must be a list: [{example}] (given: {first['input']!r})") from None
        if first["type"] in ("model_type", "dict_type"):
            keys = ", ".join(_known_keys((*first["loc"], ""))[:3])
            hint = "; the file that --profile reads is profile_file" if key == "profile" else ""
            said = f"must be a mapping of keys{keys and f' ({keys}, ...)'} to values"
            raise BadInput(f"{where}: {said} (given: {first['input']!r}){hint}") from None
        raise BadInput(f"{where}: {first['msg'].lower()} (given: {first['input']!r})") from None
    try:
        budgets = parse_budgets(list(config.latency), config.percentile, config.scope)
    except BadInput as error:
        raise error if "latency" in flags else BadInput(f"{origin}: {str(error).removeprefix('--')}") from None
    if config.latency == (FASTEST,):
        if config.min_accuracy is None:
            raise BadInput(
                f"{origin}: latency {FASTEST} needs min_accuracy (0.93: at least 93 % on the validation split)"
            )
        return config
    return config.model_copy(update={"latency": tuple(budget.asked for budget in budgets)})


def groups_flags(
    exclude: list[str] | None, min_width: list[str] | None, fixed: list[str] | None, tie: list[str] | None
) -> dict[str, Any] | None:
    """The `groups` section from repeated flags: ``NAME``, ``NAME=CHANNELS``, ``NAME,NAME``; None without any.

    Raises:
        BadInput: A width is not of the form ``NAME=CHANNELS``.
    """

    def widths(flag: str, given: list[str]) -> dict[str, int]:
        found = {}
        for text in given:
            name, _, width = text.rpartition("=")
            if not name or not width.isdecimal():
                raise BadInput(f"{flag} {text}: expected NAME=CHANNELS, such as layer1.*=16")
            found[name] = int(width)
        return found

    section: dict[str, Any] = {}
    if exclude:
        section["exclude"] = exclude
    if min_width:
        section["min_width"] = widths("--min-width", min_width)
    if fixed:
        section["fixed"] = widths("--fixed-width", fixed)
    if tie:
        section["tie"] = [[name.strip() for name in text.split(",")] for text in tie]
    return section or None


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`, section by section."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def differing_keys(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys under which two configurations differ."""
    found: list[str] = []
    for key in sorted({*a, *b}):
        x, y = a.get(key), b.get(key)
        if isinstance(x, dict) and isinstance(y, dict):
            found += differing_keys(x, y, f"{prefix}{key}.")
        elif x != y:
            found.append(f"{prefix}{key}")
    return found
