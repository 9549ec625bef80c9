"""Reads a sealed bundle without pydantic: what the runner and the servers' configurations need to know of it."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from passdeploy.shipping.hardware import Machine, misfit, this_machine
from passdeploy.shipping.sums import Refused, Sealed, open_sealed

SCHEMA = "passdeploy.bundle/1"
MANIFEST = "bundle.json"
_LISTS = ("cpu_features", "cpu_features_any", "compute_capabilities")
"""Requirements of an engine that are lists of names."""
_PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")
_MOST = 2**31
"""Batches and threads are C's integers."""


@dataclass(frozen=True)
class EngineInfo:
    """An engine of a bundle, as `bundle.json` describes it (see `passdeploy.shipping.manifest.EngineEntry`)."""

    id: str
    file: str
    sha256: str
    onnx_sha256: str
    target: str
    backend: str
    backend_version: str
    precision: str
    batch: int
    threads: int
    tolerance: float
    requires: Mapping[str, Any]
    meta: Mapping[str, Any]
    """What the compiler recorded in its engine.json."""


@dataclass(frozen=True)
class Contents:
    """A bundle whose files were checked against SHA256SUMS and whose engines are bound to its ONNX file."""

    sealed: Sealed
    manifest: Mapping[str, Any]
    engines: tuple[EngineInfo, ...]

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the outputs."""
        return tuple(self.manifest["classes"])

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(C, H, W) of one image."""
        return tuple(self.manifest["input"]["shape"][1:])

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Of one image's logits: (classes,), or (classes, H, W) of a segmentation."""
        return tuple(self.manifest["output"]["shape"][1:])

    def samples(self) -> tuple[np.ndarray, np.ndarray]:
        """Sample images (n, C, H, W) and the outputs (n, classes) that are expected for them, float32."""
        entry = self.manifest["samples"]
        images, outputs = (_array(self.sealed, entry[key]["file"]) for key in ("images", "outputs"))
        if images.shape[1:] != self.input_shape or outputs.shape[:1] != images.shape[:1] or not len(images):
            raise Refused("samples: images and outputs do not fit the bundle's input; get the bundle again")
        return images, outputs

    def choose(self, engine: str | None = None, machine: Machine | None = None) -> EngineInfo:
        """The engine of that id or target, by default the first that fits `machine` (default: this one).

        Raises:
            Refused: There is none, or none fits; says why.
        """
        machine = machine or this_machine()
        if not self.engines:
            raise Refused("the bundle holds no engine, only the ONNX file to build one from on the target")
        candidates = [e for e in self.engines if engine in (None, e.id, e.target)]
        if not candidates:
            raise Refused(f"no engine {engine!r} in the bundle; it holds {', '.join(e.id for e in self.engines)}")
        reasons = []
        for candidate in candidates:
            reason = misfit(candidate.requires, machine)
            if reason is None:
                return candidate
            reasons.append(f"engine {candidate.id}: {reason}")
        raise Refused("; ".join(reasons) + "; compile for this machine with passdeploy run --target")


def _array(sealed: Sealed, name: str) -> np.ndarray:
    try:
        array = np.lib.format.read_array(io.BytesIO(sealed.read(name)), allow_pickle=False)
    except (ValueError, EOFError, OSError, MemoryError) as error:  # the last: of a header that claims too much
        raise Refused(f"{name}: not a numpy array ({error}); get the bundle again") from None
    if array.dtype != np.float32:
        raise Refused(f"{name}: holds {array.dtype}, expected float32; get the bundle again")
    return array


def _bound(sealed: Sealed, file: str, digest: str) -> None:
    if sealed.sums.get(file) != digest:
        raise Refused(f"{file}: is not the file that {MANIFEST} is bound to; get the bundle again")


def _are_texts(values: Any) -> bool:
    return isinstance(values, (list, tuple)) and all(isinstance(value, str) for value in values)


def _engine(sealed: Sealed, entry: Mapping[str, Any], onnx: str) -> EngineInfo:
    facts = json.loads(sealed.read(entry["facts"]))
    info = EngineInfo(
        **{key: entry[key] for key in EngineInfo.__dataclass_fields__ if key != "meta"}, meta=dict(facts["meta"])
    )
    _bound(sealed, info.file, info.sha256)
    if not isinstance(info.requires, Mapping) or not all(_are_texts(info.requires.get(key, [])) for key in _LISTS):
        raise Refused(f"engine {info.id}: does not say what it requires; get the bundle again")
    if not all(isinstance(info.meta.get(key, {}), Mapping) for key in ("session", "settings")):
        raise Refused(f"engine {info.id}: {entry['facts']} holds no settings; get the bundle again")
    if facts["sha256"] != info.sha256 or facts["backend"] != info.backend:
        raise Refused(f"engine {info.id}: {entry['facts']} describes another engine; get the bundle again")
    if info.onnx_sha256 != onnx:
        raise Refused(f"engine {info.id}: was compiled from another ONNX file than the bundle's; get the bundle again")
    if info.precision not in _PRECISIONS:
        raise Refused(f"engine {info.id}: is of precision {info.precision!r}, this passdeploy knows none such")
    counts = (info.batch, info.threads)
    if not all(isinstance(count, int) and 0 < count < _MOST for count in counts) or not info.tolerance > 0:
        raise Refused(f"engine {info.id}: batch, threads or tolerance is not positive; get the bundle again")
    return info


def open_bundle(folder: Path, key: Path | None = None, *, check_content: bool = True) -> Contents:
    """Checks a bundle's digests and signature, then reads its manifest and checks what that binds together.

    Args:
        folder: The bundle.
        key: Public key (PEM); None: the signature is not looked at.
        check_content: False leaves large files that are not needed here unread (see `sums.open_sealed`).

    Raises:
        BadInput: There is no such folder.
        Refused: It is not what was sealed.
    """
    sealed = open_sealed(Path(folder), check_content=check_content)
    if key is not None:
        from passdeploy.shipping.signing import check_signature

        check_signature(sealed, Path(key))
    return read_contents(sealed)


def read_contents(sealed: Sealed) -> Contents:
    """Reads what `open_sealed` has checked. Raises `Refused` when it does not hold together."""
    try:
        manifest = json.loads(sealed.read(MANIFEST))
        if manifest["schema"] != SCHEMA:
            raise Refused(f"{MANIFEST}: schema is {manifest['schema']!r}, this passdeploy reads {SCHEMA!r}")
        parts = [part for part in manifest["parts"].values() if part is not None]
        for part in (*parts, *(manifest["samples"][key] for key in ("images", "outputs"))):
            _bound(sealed, part["file"], part["sha256"])
        onnx = manifest["parts"]["onnx"]["sha256"]
        engines = tuple(_engine(sealed, entry, onnx) for entry in manifest["engines"])
        contents = Contents(sealed, manifest, engines)
        if len(contents.classes) != manifest["output"]["shape"][1] or len(contents.input_shape) != 3:
            raise Refused(f"{MANIFEST}: class names or input shape do not fit; get the bundle again")
        ports = (manifest["input"]["name"], manifest["output"]["name"])
        if not _are_texts((manifest["name"], manifest["status"], *ports, *contents.classes)):
            raise Refused(f"{MANIFEST}: a name is no text; get the bundle again")
        if not all(isinstance(size, int) for port in ("input", "output") for size in manifest[port]["shape"]):
            raise Refused(f"{MANIFEST}: a shape is not of whole numbers; get the bundle again")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise Refused(f"{MANIFEST}: malformed ({type(error).__name__}: {error}); get the bundle again") from None
    return contents
