"""A KServe InferenceService over a Triton repository."""

from __future__ import annotations

import re
from pathlib import Path

from passdeploy.shipping.contents import Contents

FILE = "inferenceservice.yaml"
PLACEHOLDER = "pvc://models/REPOSITORY"


def resource_name(name: str) -> str:
    """A name that Kubernetes takes (RFC 1035 label, which starts with a letter)."""
    label = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return (label if label[:1].isalpha() else f"model-{label}")[:50].rstrip("-")


def write_service(
    folder: Path, contents: Contents, name: str, *, gpu: bool, cpus: int, storage_uri: str | None
) -> Path:
    """Writes `inferenceservice.yaml`.

    Args:
        folder: The Triton repository, which has to be copied to `storage_uri`.
        contents: The bundle.
        name: The model's.
        gpu: Whether a GPU is asked for.
        cpus: CPU cores: the threads of all instances.
        storage_uri: Where KServe finds the repository (s3://, gs://, pvc://, ...); None: a placeholder.
    """
    import yaml

    limits = {"cpu": str(cpus), "memory": "1Gi"} | ({"nvidia.com/gpu": "1"} if gpu else {})
    service = {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {
            "name": resource_name(name),
            "annotations": {"passdeploy/bundle-sha256": contents.sealed.root},
        },
        "spec": {
            "predictor": {
                "model": {
                    "modelFormat": {"name": "triton"},
                    "runtime": "kserve-tritonserver",
                    "protocolVersion": "v2",
                    "storageUri": storage_uri or PLACEHOLDER,
                    "resources": {"requests": dict(limits), "limits": limits},
                }
            }
        },
    }
    path = folder / FILE
    path.write_text(yaml.safe_dump(service, sort_keys=False))
    return path
