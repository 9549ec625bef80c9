"""The software bill of materials of a bundle: CycloneDX 1.6, JSON."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, metadata, version
from typing import Any

from passdeploy.shipping.manifest import BundleManifest
from passdeploy.shipping.packages import BESIDE, DISTRIBUTIONS

SBOM = "sbom.cdx.json"

_MADE_WITH = ("torch", "torchvision", "torch-pruning", "numpy", "onnx", "onnxscript", "onnxsim", "safetensors")


def _licences(name: str) -> list[dict[str, Any]]:
    """The licence expression of an installed distribution, when it states one."""
    try:
        expression = metadata(name).json.get("license_expression")
    except PackageNotFoundError:
        return []
    return [{"expression": expression}] if expression else []


def _installed(name: str) -> str | None:
    """Version of a distribution; None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _distribution(backend: str) -> str:
    """The one that is installed, else the first."""
    names = DISTRIBUTIONS.get(backend, (backend,))
    return next((name for name in names if _installed(name)), names[0])


def _library(name: str, of_version: str, scope: str) -> dict[str, Any]:
    bare = of_version.split("+")[0]
    entry = {
        "type": "library",
        "bom-ref": f"pkg:pypi/{name}@{bare}",
        "name": name,
        "version": of_version,
        "purl": f"pkg:pypi/{name}@{bare}",
        "scope": scope,
    }
    licences = _licences(name)
    return entry | ({"licenses": licences} if licences else {})


def _file(kind: str, name: str, digest: str, description: str) -> dict[str, Any]:
    return {
        "type": kind,
        "bom-ref": name,
        "name": name,
        "description": description,
        "hashes": [{"alg": "SHA-256", "content": digest}],
    }


def _libraries(manifest: BundleManifest, versions: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What it was made with (scope excluded: not needed to run it) and what runs it (required)."""
    made: dict[str, dict[str, Any]] = {}
    for name in _MADE_WITH:
        known = versions.get(name) or _installed(name)
        if known is None:
            continue
        made[name] = _library(name, str(known), "required" if name == "numpy" else "excluded")
    made["passdeploy"] = _library("passdeploy", manifest.passdeploy_version, "required")
    for engine in manifest.engines:
        name, known = _distribution(engine.backend), engine.backend_version
        if engine.backend == "torch_tensorrt":  # whose engines go by PyTorch's version
            known = str(versions.get(name) or _installed(name) or "unknown")
        made[name] = _library(name, known, "required")
        for other in BESIDE.get(engine.backend, ()):
            if beside := versions.get(other) or _installed(other):
                made[other] = _library(other, str(beside), "required")
    return [made[name] for name in sorted(made)]


def sbom(manifest: BundleManifest, versions: Mapping[str, Any]) -> str:
    """CycloneDX JSON: the model and its engines with digests, the libraries that made it and that run it.

    Args:
        manifest: The bundle's.
        versions: Distribution -> version as the run recorded them; what is not there is asked of this environment.
    """
    onnx = manifest.parts.onnx
    model = _file("machine-learning-model", onnx.file, onnx.sha256, f"{manifest.model}, trained on {manifest.data}")
    engines = [
        _file("machine-learning-model", e.file, e.sha256, f"{e.backend} engine for {e.target}, {e.precision}")
        for e in manifest.engines
    ]
    document = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, onnx.sha256 + manifest.created)}",
        "version": 1,
        "metadata": {
            "timestamp": manifest.created,
            "tools": {
                "components": [{"type": "application", "name": "passdeploy", "version": manifest.passdeploy_version}]
            },
            "component": {"type": "application", "bom-ref": "bundle", "name": manifest.name, "version": "1"},
        },
        "components": [model, *engines, *_libraries(manifest, versions)],
        "dependencies": [{"ref": "bundle", "dependsOn": [onnx.file, *(e.file for e in manifest.engines)]}],
    }
    return json.dumps(document, indent=1) + "\n"
