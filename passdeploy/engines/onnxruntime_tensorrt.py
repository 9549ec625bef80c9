"""ONNX Runtime with its TensorRT provider: TensorRT builds when the session is made; the engine file is the graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from passdeploy.engines._common import beneath
from passdeploy.engines.base import register
from passdeploy.engines.onnxruntime import CUDA, OnnxRuntime

if TYPE_CHECKING:
    from passdeploy.targets import Target


@register
class OnnxRuntimeTensorRt(OnnxRuntime):
    """As `OnnxRuntime` on a GPU, but TensorRT runs what it can and CUDA kernels the rest. Not run so far."""

    name: ClassVar[str] = "onnxruntime_tensorrt"
    provider: ClassVar[str] = "TensorrtExecutionProvider"
    # Not fp32: TensorRT's builder takes TF32 for it, and the provider has no option against that
    # (https://github.com/microsoft/onnxruntime/issues/26029).
    precisions: ClassVar[tuple[str, ...]] = ("fp16", "int8")

    def available(self, target: Target) -> str | None:
        if target.compute_capability is None:
            return "the TensorRT provider needs an NVIDIA GPU; use --backend onnxruntime on a CPU"
        return super().available(target)

    def providers(self, target: Target) -> list[Any]:
        # Half in int8 too: what is not quantised would take TF32, and is half in the other TensorRT backends.
        reduced = {"trt_fp16_enable": True, "trt_int8_enable": target.precision == "int8"}
        return [(self.provider, reduced), CUDA]

    def libraries(self) -> str:
        return beneath(self.version(), ("tensorrt",))
