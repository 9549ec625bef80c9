"""`bundle.json`: what a bundle says about itself, and what binds its files to each other.

One schema, published as `bundle.schema.json`. The writer and `verify` use these models; the runner, which does without
pydantic, reads the few keys that it needs (`passdeploy.shipping.contents`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from passdeploy.shipping.sums import Refused

SCHEMA: Literal["passdeploy.bundle/1"] = "passdeploy.bundle/1"
SCHEMA_FILE = Path(__file__).with_name("bundle.schema.json")

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Status = Literal["within_budget", "over_budget", "infeasible", "unverified", "not_equivalent", "accuracy_below_floor"]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class File(_Model):
    """A file of the bundle."""

    file: str = Field(description="Path inside the bundle.")
    sha256: Digest


class Preprocess(_Model):
    """What a server does to an image file before the engine sees it."""

    size: tuple[int, int] = Field(description="(height, width) of the engine's input, pixels.")
    resize: int | None = Field(
        description="Shorter side is resized to this, then a centre crop; null: to size at once."
    )
    mean: tuple[float, float, float] = Field(description="Normalisation inside the graph; for information only.")
    std: tuple[float, float, float] = Field(description="Normalisation inside the graph; for information only.")
    color: Literal["RGB"] = "RGB"
    interpolation: Literal["bilinear"] = "bilinear"
    antialias: bool = Field(default=True, description="When an image is made smaller; as Pillow does it.")
    scale: tuple[float, float] = Field(default=(0.0, 1.0), description="Range of the pixel values.")
    in_graph: tuple[str, ...] = Field(default=("normalisation", "prompt"), description="Done by the engine itself.")


class Port(_Model):
    """An input or output of the engines."""

    name: str
    shape: tuple[int, ...] = Field(description="With the batch as exported first; -1 where it is free.")
    dtype: Literal["float32"] = "float32"
    layout: Literal["NCHW", "NC"]


class Requirements(_Model):
    """What a machine must have for an engine to run on it; an empty list asks for nothing."""

    machine: str | None = Field(default=None, description="CPU architecture as `uname -m` gives it.")
    cpu_features: tuple[str, ...] = Field(default=(), description="Flags as in /proc/cpuinfo.")
    cpu_features_any: tuple[str, ...] = Field(default=(), description="At least one of these flags.")
    compute_capabilities: tuple[str, ...] = Field(default=(), description='NVIDIA GPUs that it was built for: "8.0".')
    or_newer: bool = Field(default=False, description="Newer compute capabilities than the lowest given run it too.")
    driver: str | None = Field(default=None, description="CUDA version of the driver that it was built beside.")
    exact_version: bool = Field(
        default=False, description="Only the very version of the backend that built it loads it."
    )


class Latency(_Model):
    """Milliseconds; null where there were too few samples to say."""

    p50: float | None = None
    p90: float | None = None
    p99: float | None = None
    mean: float | None = None
    n: int | None = None
    device: str = Field(description="The device on which it was measured.")
    scope: Literal["engine", "end_to_end"] = "engine"


class Budget(_Model):
    """What was asked for."""

    asked: str
    latency_ms: float | None
    percentile: str = "p50"
    scope: Literal["engine", "end_to_end"] = "engine"


class EngineEntry(_Model):
    """A compiled engine and what it is bound to."""

    id: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    file: str
    sha256: Digest
    facts: str = Field(description="Path of the engine.json that the compiler wrote.")
    onnx_sha256: Digest = Field(description="The ONNX file that it was compiled from.")
    target: str
    device: str
    backend: str
    backend_version: str
    precision: Literal["fp32", "fp16", "bf16", "int8", "fp8"]
    batch: int = Field(ge=1)
    threads: int = Field(ge=1)
    attached: bool = Field(description="Whether it was compiled and measured on the target itself.")
    calibration_sha256: Digest | None = Field(default=None, description="The images that int8 ranges came from.")
    requires: Requirements = Requirements()
    tolerance: float = Field(gt=0, description="max|a-b| / max|a| allowed between expected and own sample outputs.")
    latency_ms: Latency | None = Field(default=None, description="null: never measured.")
    dense_latency_ms: Latency | None = None
    huge_pages: bool = Field(default=False, description="Whether weights lay in huge pages while it was measured.")


class Samples(_Model):
    """Images and the outputs that the shipped graph must give for them."""

    images: File
    outputs: File
    count: int = Field(ge=1)


class Parts(_Model):
    """The network behind the engines, for those who want to go on working with it."""

    onnx: File
    dense_onnx: File | None = None
    config: File | None = None
    report: File | None = None
    structure: File | None = None
    architecture: File | None = None
    weights: File | None = None
    prompt: File | None = None


class BundleManifest(_Model):
    """The content of `bundle.json`."""

    schema_id: Literal["passdeploy.bundle/1"] = Field(default=SCHEMA, alias="schema")
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    created: str = Field(description="UTC, ISO 8601.")
    passdeploy_version: str
    model: str
    data: str
    data_licence: str
    method: str
    seed: int | None = None
    status: Status
    budget: Budget | None = None
    metric: str | None = Field(default=None, description='What the accuracies are, such as "top-1 accuracy".')
    accuracy: float | None = Field(default=None, ge=0, le=1, description="On test data that no choice was made on.")
    dense_accuracy: float | None = Field(default=None, ge=0, le=1)
    equivalence: dict[str, float | None] = Field(default_factory=dict, description="The proofs of the report.")
    input: Port
    output: Port
    preprocess: Preprocess
    classes: tuple[str, ...]
    parts: Parts
    engines: tuple[EngineEntry, ...]
    samples: Samples

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    @model_validator(mode="after")
    def _bound(self) -> BundleManifest:
        if len({engine.id for engine in self.engines}) != len(self.engines):
            raise ValueError("two engines of the same id")
        if len(self.classes) != self.output.shape[1]:  # the class axis, of a map of classes too
            raise ValueError(f"{len(self.classes)} class names for {self.output.shape[1]} outputs")
        return self

    def to_json(self) -> str:
        """As it is written."""
        return json.dumps(self.model_dump(mode="json", by_alias=True), indent=1, ensure_ascii=False) + "\n"

    def files(self) -> dict[str, str]:
        """Path -> digest of every file that is bound by digest."""
        files = [part for name in Parts.model_fields if (part := getattr(self.parts, name)) is not None]
        bound = {part.file: part.sha256 for part in (*files, self.samples.images, self.samples.outputs)}
        return bound | {engine.file: engine.sha256 for engine in self.engines}


def read(data: bytes) -> BundleManifest:
    """Reads `bundle.json`.

    Raises:
        Refused: Not of the schema; one line that names the first thing that is wrong.
    """
    try:
        return BundleManifest.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise Refused(
            f"bundle.json: {where}: {first['msg']}; it was not written by a passdeploy that this one knows"
        ) from None


def json_schema() -> dict[str, Any]:
    """The published JSON Schema."""
    schema = BundleManifest.model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": SCHEMA, **schema}


def write_schema() -> None:
    """Writes `bundle.schema.json` anew: ``python -m passdeploy.shipping.manifest``."""
    SCHEMA_FILE.write_text(json.dumps(json_schema(), indent=1) + "\n")


if __name__ == "__main__":
    write_schema()
