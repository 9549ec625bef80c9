"""The latency model: predicts a compiled engine's latency from the kept units, before it is compiled.

It is fitted to whole engines measured on the target, so that fusion, padding, layout changes and launch floors are in
it, as the ratio to the dense engine measured beside each of them, so that the mood of the machine is not.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from passdeploy.errors import BadInput
from passdeploy.latency.features import CACHES, TERMS, Features
from passdeploy.latency.regression import Fit, cross_validate, fit_base
from passdeploy.workspace import write_json

if TYPE_CHECKING:
    import torch

    from passdeploy.groups import Operator

FORM = [*TERMS, *map(str, CACHES), "shared"]
"""What a model is made of: the error of one made of something else says nothing of this one."""
SCHEMA = "passdeploy.profile/1"
STEPS = (8, 16, 32, 64)
FEWEST = 10
"""Structures of which a fit says something about others."""


@dataclass
class LatencyModel:
    """Predicts milliseconds from kept units.

    Attributes:
        features: Of the network.
        dense_ms: Latency of the dense engine, which turns ratios into milliseconds.
        widths: Structures it was fitted on [n, groups].
        ratios: Their measured latency over the dense engine's [n].
        base: The fit.
        provenance: Target, device, backend, its version, precision, batch, threads, date, seconds, and how many
            structures had ``failed`` to compile or run (0 where it does not say).
        mape: Mean absolute relative error on structures left out of the fit (5-fold cross-validation); None before a
            fit.
        max_ape: The largest of these.
        repeatability: Mean relative difference between measurements of the same structure.
        kind: ``measured`` here, or ``profile`` when it was read from a file.
        trust: Weights of the measurements [n]; alike if None.
    """

    features: Features
    dense_ms: float
    widths: np.ndarray
    ratios: np.ndarray
    base: Fit
    provenance: dict[str, Any] = field(default_factory=dict)
    mape: float | None = None
    max_ape: float | None = None
    repeatability: float | None = None
    kind: str = "measured"
    trust: np.ndarray | None = None

    def __post_init__(self) -> None:
        self._coefficients = self.base.families[self.features.family]
        self._caches = [(cache, c) for cache, c in zip(CACHES, self.base.caches, strict=True) if c > 0]

    @classmethod
    def fit(
        cls,
        operators: Sequence[Operator],
        units: Sequence[int],
        widths: np.ndarray,
        ratios: np.ndarray,
        dense_ms: float,
        *,
        steps: Sequence[int] = STEPS,
        provenance: Mapping[str, Any] | None = None,
        repeatability: float | None = None,
        bytes_per_weight: int = 4,
        weights: np.ndarray | None = None,
        fewest: int = FEWEST,
    ) -> LatencyModel:
        """Fits to measured structures.

        Args:
            operators: Of the network, in execution order.
            units: Units per group.
            widths: Kept units of the measured structures [n, groups].
            ratios: Their latency over the dense engine's [n].
            dense_ms: Latency of the dense engine.
            steps: Width steps among which cross-validation chooses (from `passdeploy.latency.steps`).
            provenance: Recorded in the file.
            repeatability: Of the measurements, recorded beside the error.
            bytes_per_weight: By precision.
            weights: How much each measurement is to be trusted [n]; alike if None.
            fewest: Structures that there have to be: fewer, the dense one included, only where there are no more.

        Raises:
            BadInput: There are fewer.
        """
        widths, ratios = np.asarray(widths, dtype=float), np.asarray(ratios, dtype=float)
        if len(ratios) < fewest:
            raise BadInput(
                f"latency model: {len(ratios)} measured structures are too few, at least {fewest} are needed; raise "
                "profile.seconds (and profile.structures) in the configuration"
            )
        trust = np.ones(len(ratios)) if weights is None else np.asarray(weights, dtype=float)
        chosen = cross_validate(operators, units, widths, ratios, trust, steps, bytes_per_weight)
        features = Features(operators, units, chosen.step, bytes_per_weight)
        base = fit_base(features, widths, ratios, trust, chosen.step, chosen.ridge)
        return cls(
            features,
            dense_ms,
            widths,
            ratios,
            base,
            dict(provenance or {}),
            mape=float(chosen.errors.mean()),
            max_ape=float(chosen.errors.max()),
            repeatability=repeatability,
            trust=trust,
        )

    def ratios_many(self, w: np.ndarray) -> np.ndarray:
        """Predicted latency over the dense engine's [n], for kept units [n, groups]."""
        w = np.asarray(w, dtype=float)
        ratio: np.ndarray = self.features.cost(w, self._coefficients) + self.base.constant
        if self._caches:
            weights = self.features.weights(w)
            for cache, c in self._caches:
                ratio += c * self.features.spilled(weights, cache)
        return ratio

    def predict_many(self, w: np.ndarray) -> np.ndarray:
        """Predicted milliseconds [n], for kept units [n, groups]."""
        return self.ratios_many(w) * self.dense_ms

    def predict(self, w: Sequence[float] | np.ndarray) -> float:
        """Predicted milliseconds for kept units [groups]."""
        return float(self.predict_many(np.asarray(w, dtype=float)[None])[0])

    def predict_soft(self, w: torch.Tensor) -> torch.Tensor:
        """Predicted milliseconds (a scalar) for fractional kept units [groups], differentiable.

        Linear between the steps of the hardware, and without the price of widths off the grid: where the search goes,
        the allocator rounds.
        """
        import torch

        terms = self.features.soft_terms(w[None])[0]
        ratio = (terms * torch.as_tensor(self._coefficients, dtype=w.dtype, device=w.device)).sum() + self.base.constant
        if self._caches:
            weights = terms[:, TERMS.index("weights")].sum()
            for cache, c in self._caches:
                ratio = ratio + c * self.features.spilled(weights, cache)
        return ratio * self.dense_ms

    @property
    def step(self) -> int:
        """Width step of the hardware, as the fit found it."""
        return self.base.step

    def summary(self) -> dict[str, Any]:
        """The report's ``predictor``."""
        return {
            "kind": self.kind,
            "mape": self.mape,
            "max_ape": self.max_ape,
            "n": len(self.ratios),
            "repeatability": self.repeatability,
        }

    def to_json(self) -> dict[str, Any]:
        """The portable profile: schema `passdeploy.profile/1`."""
        trust = np.ones(len(self.ratios)) if self.trust is None else self.trust
        return {
            "schema": SCHEMA,
            "operators": operators_digest(self.features),
            "form": FORM,
            "provenance": self.provenance,
            "dense_ms": self.dense_ms,
            "error": {"mape": self.mape, "max_ape": self.max_ape, "repeatability": self.repeatability},
            "step": self.base.step,
            "ridge": self.base.ridge,
            "bytes_per_weight": self.features.bytes_per_weight,
            "samples": [
                {"kept": [int(v) for v in w], "ratio": r, "trust": t}
                for w, r, t in zip(self.widths, self.ratios.tolist(), trust.tolist(), strict=True)
            ],
        }

    def save(self, path: Path) -> None:
        """Writes the profile; whole or not at all."""
        write_json(path, self.to_json())

    @classmethod
    def from_json(
        cls, data: Mapping[str, Any], operators: Sequence[Operator], units: Sequence[int], kind: str = "profile"
    ) -> LatencyModel:
        """Rebuilds the model from its samples.

        Raises:
            BadInput: Not a profile, or one of another network.
        """
        try:
            if data["schema"] != SCHEMA:
                raise BadInput(f"profile: schema is {data['schema']!r}, expected {SCHEMA!r}")
            features = Features(operators, units, int(data["step"]), int(data["bytes_per_weight"]))
            if data["operators"] != operators_digest(features):
                raise BadInput(
                    "profile: measured for another network or input size, or with other exclude or tie (configuration: "
                    "groups); run `passdeploy profile` again with what this run has"
                )
            widths = np.array([s["kept"] for s in data["samples"]], dtype=float)
            ratios = np.array([s["ratio"] for s in data["samples"]], dtype=float)
            dense_ms = float(data["dense_ms"])
            if not all(0 < latency < math.inf for latency in (dense_ms, *ratios)):
                raise BadInput("profile: holds a latency that is not above zero")
            trust = np.array([s.get("trust", 1.0) for s in data["samples"]], dtype=float)
            step, ridge = int(data["step"]), float(data["ridge"])
            usable = np.isfinite(trust).all() and (trust >= 0).all() and trust.any() and 0 < ridge < math.inf
            usable = usable and ((widths >= 0) & (widths <= features.units)).all()
            if not (usable and step > 0 and features.bytes_per_weight > 0):
                raise BadInput("profile: holds a kept, trust, ridge, step or bytes_per_weight that can't be")
            error = {key: _error(data["error"][key]) for key in ("mape", "max_ape", "repeatability")}
            if data.get("form") != FORM:  # of the samples only the measuring is still true
                chosen = cross_validate(operators, units, widths, ratios, trust, [step], features.bytes_per_weight)
                ridge, errors = chosen.ridge, chosen.errors
                error = {**error, "mape": float(errors.mean()), "max_ape": float(errors.max())}
            base = fit_base(features, widths, ratios, trust, step, ridge)
            return cls(features, dense_ms, widths, ratios, base, dict(data["provenance"]), error["mape"],
                       error["max_ape"], error["repeatability"], kind, trust)  # fmt: skip
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as problem:
            raise BadInput(f"profile: malformed ({type(problem).__name__}: {problem})") from None

    @classmethod
    def load(cls, path: Path, operators: Sequence[Operator], units: Sequence[int]) -> LatencyModel:
        """Reads a profile. Raises `BadInput` when it can't be read or is of another network."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as problem:
            raise BadInput(f"{path}: cannot be read as a profile ({problem})") from None
        try:
            return cls.from_json(data, operators, units)
        except BadInput as problem:
            raise BadInput(f"{path}: {problem}") from None


def _error(value: float | None) -> float | None:
    """A recorded error; raises ValueError or TypeError when it is none, which else the report finds out hours later."""
    if value is not None and not 0 <= value < math.inf:
        raise ValueError(f"an error of {value}")
    return value


def operators_digest(features: Features) -> str:
    """SHA-256 of what the features say about the network."""
    digest = hashlib.sha256()
    for array in (features.units, features.in_units, features.out_units, features.in_free, features.out_free,
                  features.work, features.in_area, features.out_area):  # fmt: skip
        digest.update(np.ascontiguousarray(array, dtype="<f8").tobytes())
    digest.update(json.dumps([list(g) for g in features.gates]).encode())
    return digest.hexdigest()
