"""Writes a bundle: engines, ONNX, manifest, model card, SBOM and samples, sealed by SHA256SUMS.

bundle/
  SHA256SUMS         digest of every other file; checked before anything else is parsed
  bundle.json        what is bound to what (schema: bundle.schema.json in this package)
  MODEL_CARD.md  sbom.cdx.json  README.txt
  model.onnx         the function: normalisation and prompt inside
  engines/ID/        engine file and the engine.json that its compiler wrote
  samples/           images.npy, outputs.npy
  parts/             config.yaml, report.json, structure.json, ... as far as they were given
  model.sig          only when signed
"""

from __future__ import annotations

import json
import platform
import re
import shutil
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from passdeploy.engines._common import digest_images
from passdeploy.engines.base import TOLERANCE
from passdeploy.environment import HUGE_PAGES
from passdeploy.errors import BadInput
from passdeploy.shipping import manifest as m
from passdeploy.shipping.card import MODEL_CARD, README, model_card, readme
from passdeploy.shipping.contents import MANIFEST
from passdeploy.shipping.hardware import this_machine
from passdeploy.shipping.replace import replace_folder
from passdeploy.shipping.sbom import SBOM, sbom
from passdeploy.shipping.source import BundleSource, EngineSource
from passdeploy.shipping.sums import SUMS, digest_file, write

if TYPE_CHECKING:
    from passdeploy.targets import Target

__all__ = ["SAMPLES", "BundleSource", "EngineSource", "write_bundle"]

SAMPLES = 8
"""Images that a bundle carries at most."""
AMPERE = "8.0"
"""The oldest compute capability that TensorRT's hardware compatible engines run on."""

_OPTIONAL = {
    "dense_onnx": "dense.onnx",
    "config": "config.yaml",
    "structure": "structure.json",
    "architecture": "architecture.json",
    "weights": "model.safetensors",
    "prompt": "prompt.safetensors",
}


def write_bundle(
    folder: Path, source: BundleSource, *, key: Path | None = None, created: datetime | None = None
) -> Path:
    """Writes a sealed bundle and puts it in place of `folder` in one step.

    Args:
        folder: An earlier bundle there is replaced; anything else there is left alone and refused.
        source: What goes in.
        key: Private key (PEM, elliptic curve) to sign with; None: unsigned.
        created: Time stamp; None: now.

    Returns:
        `folder`.

    Raises:
        BadInput: An engine that does not belong to the ONNX file's input, missing files, a folder that is no bundle.
        Unavailable: `key` was given and model-signing is not installed.
    """
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and ((folder / SUMS).is_file() or not any(folder.iterdir()))):
        raise BadInput(f"{folder}: exists and is no bundle; give another folder or remove it")
    if key is not None:
        from passdeploy.shipping.signing import require_signing

        require_signing()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            staged = work / folder.name
            staged.mkdir()
            _fill(staged, source, created or datetime.now(UTC), signed=key is not None)
            if key is not None:
                from passdeploy.shipping.signing import sign

                sign(staged, key)
            write(staged)
            replace_folder(staged, folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise BadInput(
            f"{error.filename or folder}: the bundle cannot be written ({error.strerror or error})"
        ) from None
    return folder


def _fill(folder: Path, source: BundleSource, created: datetime, *, signed: bool) -> None:
    onnx = _copy(folder, source.onnx, "model.onnx")
    input_port, output_port = _ports(source.onnx)
    manifest = m.BundleManifest(
        name=re.sub(r"[^A-Za-z0-9._-]+", "-", source.name).lstrip("-._") or "bundle",
        created=created.astimezone(UTC).isoformat(timespec="seconds"),
        passdeploy_version=_version(),
        model=source.model,
        data=source.data,
        data_licence=source.data_licence,
        method=str(source.report.get("method", "unknown")),
        seed=source.report.get("seed"),
        status=source.report.get("status", "unverified"),
        budget=_budget(source.report),
        metric=source.report.get("provenance", {}).get("metric"),
        accuracy=source.report.get("pruned", {}).get("accuracy"),
        dense_accuracy=source.report.get("dense", {}).get("accuracy"),
        equivalence=dict(source.report.get("equivalence", {})),
        input=input_port,
        output=output_port,
        preprocess=m.Preprocess(
            size=source.preprocess.size,
            resize=source.preprocess.resize,
            mean=source.preprocess.mean,
            std=source.preprocess.std,
            in_graph=("normalisation", "prompt") if source.prompt else ("normalisation",),
        ),
        classes=tuple(source.classes),
        parts=_parts(folder, source, onnx),
        engines=tuple(_engine(folder, e, source, onnx.sha256) for e in source.engines),
        samples=_samples(folder, source, input_port),
    )
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    (folder / MODEL_CARD).write_text(model_card(manifest, signed=signed), encoding="utf-8")
    (folder / README).write_text(readme(manifest, signed=signed), encoding="utf-8")
    (folder / SBOM).write_text(
        sbom(manifest, source.report.get("environment", {}).get("versions", {})), encoding="utf-8"
    )


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("passdeploy")
    except PackageNotFoundError:
        return "0+source"


def _copy(folder: Path, source: Path, name: str) -> m.File:
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        raise BadInput(f"{source}: cannot be copied into the bundle ({error.strerror or error})") from None
    return m.File(file=name, sha256=digest_file(target))


def _parts(folder: Path, source: BundleSource, onnx: m.File) -> m.Parts:
    files: dict[str, m.File] = {"onnx": onnx}
    for part, name in _OPTIONAL.items():
        path: Path | None = getattr(source, part)
        if path is not None:
            files[part] = _copy(folder, path, f"parts/{name}")
    if source.report:
        path = folder / "parts" / "report.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(source.report, indent=1) + "\n", encoding="utf-8")
        files["report"] = m.File(file="parts/report.json", sha256=digest_file(path))
    return m.Parts(**files)


def _ports(path: Path) -> tuple[m.Port, m.Port]:
    import onnx

    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:
        raise BadInput(f"{path}: cannot be read as ONNX ({type(error).__name__})") from None
    held = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in held]
    if len(inputs) != 1 or len(model.graph.output) != 1:
        raise BadInput(f"{path}: has {len(inputs)} inputs and {len(model.graph.output)} outputs, expected one of each")
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in model.graph.initializer):
        raise BadInput(f"{path}: keeps its weights in another file; export it as a single file")

    def port(value: onnx.ValueInfoProto, layout: Any) -> m.Port:
        dims = value.type.tensor_type.shape.dim
        shape = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in dims)
        if len(shape) != len(layout):
            raise BadInput(f"{path}: {value.name!r} has {len(shape)} axes, expected {layout}")
        return m.Port(name=value.name, shape=shape, layout=layout)

    output = model.graph.output[0]
    rank = len(output.type.tensor_type.shape.dim)
    return port(inputs[0], "NCHW"), port(output, "NCHW" if rank == 4 else "NC")


def _budget(report: Mapping[str, Any]) -> m.Budget | None:
    budget = report.get("budget")
    if not budget:
        return None
    return m.Budget(**{key: budget[key] for key in m.Budget.model_fields if key in budget})


def _latency(given: Mapping[str, Any] | None, target: Target, report: Mapping[str, Any]) -> m.Latency | None:
    if given is None:
        return None
    known = {key: given[key] for key in ("p50", "p90", "p99", "mean", "n") if key in given}
    scope = report.get("budget", {}).get("scope", "engine")
    return m.Latency(**known, device=target.device, scope=scope)


def _requirements(meta: Mapping[str, Any], target: Target) -> m.Requirements:
    if target.compute_capability is None:
        native = target.backend == "inductor"  # the others' engine files are graphs, compiled at load
        return m.Requirements(
            machine=platform.machine() if native else None,
            cpu_features=tuple(sorted(meta.get("cpu_flags", ()))),
            cpu_features_any=tuple(meta.get("cpu_flags_any", ())),
        )
    options = meta.get("options", {})
    capabilities = list(meta.get("compute_capabilities") or target.compute_capability.split(","))
    if options.get("hardware_compatible") and AMPERE not in capabilities:  # whatever it was built on
        capabilities.append(AMPERE)
    compiled = target.backend in ("tensorrt", "tensorrt_rtx")  # what ONNX Runtime loads is still a graph
    return m.Requirements(
        compute_capabilities=tuple(capabilities),
        or_newer=bool(options.get("hardware_compatible", False)),
        driver=meta.get("driver") or (this_machine().driver if target.attached else None),
        exact_version=compiled and not options.get("version_compatible", False),
    )


def _calibration(engine: EngineSource, meta: Mapping[str, Any]) -> str | None:
    """What the engine records, unless it is given; None for what was not calibrated."""
    if engine.calibration is None:
        return meta.get("calibration_sha256")
    return digest_images(np.ascontiguousarray(engine.calibration, dtype=np.float32))


def _engine(folder: Path, engine: EngineSource, source: BundleSource, onnx: str) -> m.EngineEntry:
    from passdeploy.engines.files import FACTS, load_engine

    loaded = load_engine(engine.folder)
    target = engine.target
    if loaded.backend != target.backend:
        raise BadInput(f"{engine.folder}: engine of {loaded.backend}, but its target says {target.backend}")
    name = f"{target.name}-{target.backend}-{target.precision}-b{target.batch}".replace("_", "-").lower()
    where = f"engines/{name}"
    copied = _copy(folder, engine.folder / f"engine{loaded.suffix}", f"{where}/engine{loaded.suffix}")
    _copy(folder, engine.folder / FACTS, f"{where}/{FACTS}")
    report = source.report if len(source.engines) == 1 and target.attached else {}
    latency = engine.latency or report.get("pruned", {}).get("latency_ms")
    dense = engine.dense_latency or report.get("dense", {}).get("latency_ms")
    on_cpu = target.compute_capability is None
    return m.EngineEntry(
        id=name,
        file=copied.file,
        sha256=copied.sha256,
        facts=f"{where}/{FACTS}",
        onnx_sha256=onnx,
        target=target.name,
        device=target.device,
        backend=loaded.backend,
        backend_version=str(loaded.meta.get("version", "unknown")),
        precision=cast(Any, target.precision),  # checked by the model
        batch=target.batch,
        threads=target.threads,
        attached=target.attached,
        calibration_sha256=_calibration(engine, loaded.meta),
        requires=_requirements(loaded.meta, target),
        tolerance=engine.tolerance or TOLERANCE[target.precision],
        latency_ms=_latency(latency, target, source.report),
        dense_latency_ms=_latency(dense, target, source.report),
        huge_pages=on_cpu and report.get("environment", {}).get("settings", {}).get(HUGE_PAGES) == "yes",
    )


def _samples(folder: Path, source: BundleSource, port: m.Port) -> m.Samples:
    images = np.ascontiguousarray(source.images[:SAMPLES], dtype=np.float32)
    if images.ndim != 4 or not len(images) or images.shape[1:] != port.shape[1:]:
        raise BadInput(f"bundle: sample images have shape {list(images.shape)}, expected (n, {port.shape[1:]})")
    if source.outputs is None:
        outputs = _reference(source.onnx, images, port)
    else:
        outputs = np.ascontiguousarray(source.outputs[:SAMPLES], dtype=np.float32)
    if len(outputs) != len(images) or not np.isfinite(outputs).all():
        raise BadInput("bundle: sample outputs are not finite, or not one row per sample image")
    files = {}
    (folder / "samples").mkdir()
    for name, array in (("images", images), ("outputs", outputs)):
        path = folder / "samples" / f"{name}.npy"
        np.save(path, array, allow_pickle=False)
        files[name] = m.File(file=f"samples/{name}.npy", sha256=digest_file(path))
    return m.Samples(**files, count=len(images))


def _reference(path: Path, images: np.ndarray, port: m.Port) -> np.ndarray:
    """The graph's outputs, unoptimised: what every engine has to reproduce."""
    import onnxruntime as ort

    from passdeploy.shipping.executors.base import in_batches

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    batch = port.shape[0] if port.shape[0] > 0 else len(images)
    return in_batches(lambda part: session.run(None, {port.name: part})[0], images, batch)
