"""TensorRT-RTX: compiles ahead of time for GPUs that are not here; its engine is no TensorRT plan.

The engine is finished on the GPU that loads it (kernels are compiled just in time, within seconds), which is why one
file can hold several compute capabilities. There are no plugins, so custom kernels run beside the engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from passdeploy.engines._trt import Options, TrtBackend, capabilities
from passdeploy.engines.base import CompileInput, Engine, register
from passdeploy.errors import BadInput

if TYPE_CHECKING:
    from passdeploy.targets import Target

KNOWN = ((7, 5), (8, 0), (8, 6), (8, 9), (12, 0), (12, 1))
"""The compute capabilities that TensorRT-RTX 1.7 names (`tensorrt_rtx.ComputeCapability`); 9.0 and 10.x are not among
them. On a GPU of one of those it can only be asked to compile for what is attached (``CURRENT``)."""


@register
class TensorRtRtx(TrtBackend):
    """TensorRT-RTX through Polygraphy."""

    name: ClassVar[str] = "tensorrt_rtx"
    title: ClassVar[str] = "TensorRT-RTX"
    suffix: ClassVar[str] = ".tensorrt_rtx"
    precisions: ClassVar[tuple[str, ...]] = ("fp16", "fp32", "bf16", "int8", "fp8")
    module: ClassVar[str] = "tensorrt_rtx"
    install: ClassVar[str] = "tensorrt-rtx-cu13"
    environment: ClassVar[dict[str, str]] = {"POLYGRAPHY_USE_TENSORRT_RTX": "1"}

    def reason(self, target: Target) -> str | None:
        unknown = [f"{a}.{b}" for a, b in capabilities(target) if (a, b) not in KNOWN]
        if not unknown or target.attached:
            return None
        known = ", ".join(f"{a}.{b}" for a, b in KNOWN)
        return (
            f"TensorRT-RTX cannot compile for compute capability {', '.join(unknown)} ahead of time "
            f"(it knows {known}); compile on the machine that has the {target.device}, or use --backend tensorrt there"
        )

    def unproven(self, target: Target) -> bool:
        return any(capability not in KNOWN for capability in capabilities(target))

    def compile(self, source: CompileInput, target: Target, options: Options | None = None) -> Engine:
        given = options or self.options
        if given.version_compatible or given.hardware_compatible:  # the engine would say of itself what it is not
            raise BadInput("tensorrt_rtx: version_compatible and hardware_compatible are options of full TensorRT")
        return super().compile(source, target, options)

    def convert(self, data: bytes, source: CompileInput, target: Target) -> bytes:
        data = super().convert(data, source, target)
        if target.precision == "fp32" and (7, 5) in capabilities(target):
            from passdeploy.engines._turing import without_products

            return without_products(data)
        return data

    def job(self, target: Target) -> dict[str, Any]:
        wanted = capabilities(target)
        here = target.attached and any(capability not in KNOWN for capability in wanted)
        return {"compute_capabilities": "current" if here else wanted}
