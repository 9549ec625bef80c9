"""TensorRT: builds on the GPU that will run the engine, timing kernels as it goes."""

from __future__ import annotations

import ctypes.util
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from passdeploy.engines._common import missing
from passdeploy.engines._trt import Options, TrtBackend
from passdeploy.engines.base import CompileInput, Engine, register
from passdeploy.user_cache import user_cache

if TYPE_CHECKING:
    from passdeploy.targets import Target


def timing_cache(version: str, device: str) -> Path | None:
    """Where builds of one version on one kind of GPU share their kernel timings; None where nothing can be written."""
    root = user_cache()
    kind = "".join(c if c.isalnum() else "-" for c in f"{version}-{device}").lower()
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    path = root / f"tensorrt-{kind}.timing"
    files = (path, path.with_name(f"{path.name}.lock"))  # another user's, after a run as root
    fit = os.access(root, os.W_OK) and all(os.access(file, os.W_OK) for file in files if file.exists())
    return path if fit else None


def libraries() -> bool:
    """Whether the bindings and the libraries are here; PyPI alone has only the bindings."""
    if missing("tensorrt", "tensorrt"):
        return False
    return missing("tensorrt_libs", "tensorrt") is None or ctypes.util.find_library("nvinfer") is not None


@register
class TensorRt(TrtBackend):
    """Full TensorRT through Polygraphy."""

    name: ClassVar[str] = "tensorrt"
    title: ClassVar[str] = "TensorRT"
    suffix: ClassVar[str] = ".plan"
    precisions: ClassVar[tuple[str, ...]] = ("fp16", "fp32", "bf16", "int8", "fp8")
    module: ClassVar[str] = "tensorrt"
    install: ClassVar[str] = "tensorrt tensorrt-cu13 tensorrt-cu12"
    environment: ClassVar[dict[str, str]] = {"POLYGRAPHY_USE_TENSORRT_RTX": "0"}

    def available(self, target: Target) -> str | None:
        if target.compute_capability is not None and not libraries():
            return (
                "TensorRT's libraries are not installed; pip install tensorrt "
                "--extra-index-url https://pypi.nvidia.com, or use the image that Dockerfile.gpu builds"
            )
        return super().available(target)

    def reason(self, target: Target) -> str | None:
        if not target.attached:
            return (
                f"TensorRT builds on the GPU that will run the engine and no {target.device} is attached; "
                "use --backend tensorrt_rtx to compile for it here"
            )
        return None

    def convert(self, data: bytes, source: CompileInput, target: Target) -> bytes:
        data = super().convert(data, source, target)
        if source.masked and self.masks_by_kernel(target):
            from passdeploy.engines._plugin_graph import with_plugin

            return with_plugin(data)
        return data

    def job(self, target: Target) -> dict[str, Any]:
        return {}

    def masks_by_kernel(self, target: Target) -> bool:
        return target.precision not in ("int8", "fp8")

    def builds_vary(self, target: Target) -> bool:
        return True

    def rebuild(self, source: CompileInput, target: Target) -> Engine:
        """Without the timing cache, which would choose the same kernels again."""
        return super().compile(source, target, replace(self.options, timing_cache=""))

    def compile(self, source: CompileInput, target: Target, options: Options | None = None) -> Engine:
        options = options or self.options
        if options.timing_cache is None:
            # A cache that can't be written is no reason to fail: kernels are timed anew.
            options = replace(options, timing_cache=str(timing_cache(self.version(), target.device) or ""))
        return super().compile(source, target, options)
