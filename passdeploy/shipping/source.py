"""What a bundle is written from: named by the caller, copied by `passdeploy.shipping.bundle`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from passdeploy.data.base import Preprocess
    from passdeploy.targets import Target


@dataclass(frozen=True)
class EngineSource:
    """An engine that goes into a bundle.

    Attributes:
        folder: What `Backend.save` wrote: the engine file and engine.json.
        target: What it was compiled for.
        latency: As in a report's `latency_ms`; None when it was never measured. With a single engine the report's is
            taken when this is None and the target is attached.
        dense_latency: The dense engine's on the same target.
        tolerance: On the samples; None: that of the precision (`passdeploy.engines.base.TOLERANCE`).
        calibration: Images that the ranges of an int8 or fp8 engine came from; their digest is recorded. None: the
            digest that the engine's compiler recorded.
    """

    folder: Path
    target: Target
    latency: Mapping[str, Any] | None = None
    dense_latency: Mapping[str, Any] | None = None
    tolerance: float | None = None
    calibration: np.ndarray | None = None


@dataclass(frozen=True)
class BundleSource:
    """What a bundle is written from. Files are copied; nothing is taken away.

    Attributes:
        name: Letters, digits, dot, dash, underscore; other characters become dashes.
        model: Name of the network.
        data: Name of the data set.
        classes: Names in the order of the outputs.
        preprocess: How an image file becomes the engine's input.
        onnx: The shipped graph (`images` float32 NCHW RGB in [0, 1] -> `logits`).
        engines: Compiled from that very file; may be empty.
        images: Real validation images (n, 3, H, W), float32 in [0, 1]; the first `bundle.SAMPLES` are shipped.
        outputs: Expected logits (n, classes) of those images; None: computed with ONNX Runtime from `onnx`.
        report: Content of report.json (schema `passdeploy.report/1`): status, budget, accuracy, latency, proofs.
        data_licence: Of the data set.
        dense_onnx: Optional parts from here on, copied when given.
        config: config.yaml of the run.
        structure: structure.json.
        architecture: architecture.json.
        weights: model.safetensors.
        prompt: prompt.safetensors.
    """

    name: str
    model: str
    data: str
    classes: Sequence[str]
    preprocess: Preprocess
    onnx: Path
    engines: Sequence[EngineSource]
    images: np.ndarray
    outputs: np.ndarray | None = None
    report: Mapping[str, Any] = field(default_factory=dict)
    data_licence: str = "unknown"
    dense_onnx: Path | None = None
    config: Path | None = None
    structure: Path | None = None
    architecture: Path | None = None
    weights: Path | None = None
    prompt: Path | None = None
