"""A KServe InferenceService over a Triton repository."""

from __future__ import annotations

import hashlib
import math
import re
from pathlib import Path

from passdeploy.huge_pages import VALUE, VARIABLE
from passdeploy.shipping.contents import Contents

FILE = "inferenceservice.yaml"
LONGEST = 50
PLACEHOLDER = "pvc://models/REPOSITORY"


def resource_name(name: str) -> str:
    """A name that Kubernetes takes (RFC 1035 label, which starts with a letter).

    Of a long name the end, where the budget stands, is replaced by a digest, so that no other's service is.
    """
    label = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    label = label if label[:1].isalpha() else f"model-{label}"
    if len(label) <= LONGEST:
        return label.rstrip("-")
    return f"{label[: LONGEST - 9].rstrip('-')}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def memory_gib(model: Path, instances: int, *, gpu: bool) -> int:
    """GiB that a server of one model is given: estimated, not measured; over its limit the kernel ends the server.

    0.6 for the server, 3 for CUDA and its libraries, and for each instance 0.15, since Triton's Python starts a process
    for it, and three times the largest file: as it is read, parsed, and as the weights that its kernels want.

    Args:
        model: The model's folder in the repository.
        instances: Each loads a file for itself.
        gpu: Whether they run on one.
    """
    largest = max((path.stat().st_size for path in (model / "1").rglob("*") if path.is_file()), default=0)
    return math.ceil(0.6 + instances * (0.15 + 3 * largest / 2**30)) + (3 if gpu else 0)


def write_service(
    folder: Path,
    contents: Contents,
    name: str,
    *,
    gpu: bool,
    cpus: int,
    instances: int,
    storage_uri: str | None,
    huge_pages: bool,
) -> Path:
    """Writes `inferenceservice.yaml`.

    Args:
        folder: The Triton repository, with the model in it, which has to be copied to `storage_uri`.
        contents: The bundle.
        name: The model's.
        gpu: Whether a GPU is asked for.
        cpus: CPU cores: the threads of all instances.
        instances: Of the model.
        storage_uri: Where KServe finds the repository (s3://, gs://, pvc://, ...); None: a placeholder.
        huge_pages: Whether the engine was measured with weights in huge pages, which the server then asks for.
    """
    import yaml

    memory = f"{memory_gib(folder / name, instances, gpu=gpu)}Gi"
    limits = {"cpu": str(cpus), "memory": memory} | ({"nvidia.com/gpu": "1"} if gpu else {})
    asks = {"env": [{"name": VARIABLE, "value": VALUE}]} if huge_pages else {}
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
                    **asks,
                }
            }
        },
    }
    path = folder / FILE
    path.write_text(yaml.safe_dump(service, sort_keys=False), encoding="utf-8")
    return path
