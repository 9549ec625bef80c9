"""What pip has to install for an engine to run: the names of its distributions, which are not those of backends."""

from __future__ import annotations

from passdeploy.shipping.contents import EngineInfo

DISTRIBUTIONS = {
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "onnxruntime_tensorrt": ("onnxruntime-gpu",),
    "openvino": ("openvino",),
    "tensorrt_rtx": ("tensorrt-rtx-cu13",),
    "tensorrt": ("tensorrt",),
    "torch_tensorrt": ("torch-tensorrt",),
    "inductor": ("torch",),
}
"""Backend -> the distributions that it may come in; the last is the one for GPUs."""

BESIDE = {
    "tensorrt_rtx": ("cuda-bindings",),
    "tensorrt": ("cuda-bindings",),
    "torch_tensorrt": ("torch", "tensorrt"),
}
"""Backend -> what runs its engines beside that."""


def packages(engine: EngineInfo) -> tuple[str, ...]:
    """Requirements as pip takes them, in the versions that the engine was made with: ``("onnxruntime-gpu==1.23.0",)``.

    numpy, which the runner itself needs, is not among them.
    """
    names = DISTRIBUTIONS.get(engine.backend, (engine.backend,))
    beside = dict.fromkeys(BESIDE.get(engine.backend, ()))
    versions: dict[str, str | None]
    if engine.backend == "torch_tensorrt":  # its engines go by PyTorch's version, and record the other two
        recorded = {name: engine.meta.get(name.replace("-", "_")) for name in (*names, *beside)}
        versions = recorded | {"torch": engine.backend_version}
    else:
        versions = {names[-1 if engine.requires.get("compute_capabilities") else 0]: engine.backend_version} | beside
    return tuple(
        name if version in (None, "unknown") else f"{name}=={str(version).split('+')[0]}"
        for name, version in versions.items()
    )
