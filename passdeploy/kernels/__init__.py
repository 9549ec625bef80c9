"""CUDA kernels of the masked forward and of the input stage, with reference implementations for every other device.

`masked_affine_act`, `batch_norm_affine`, `prompted_input` and `stage_input` are torch operators (autograd,
``torch.compile``). `passdeploy.kernels.arrays` runs the same kernels without torch. Nothing heavy is imported until it
is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from passdeploy.kernels.input_op import prompted_input, stage_input
    from passdeploy.kernels.masked_op import batch_norm_affine, masked_affine_act

__all__ = ["batch_norm_affine", "masked_affine_act", "prompted_input", "stage_input"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from passdeploy.kernels import input_op, masked_op

    return getattr(input_op if "input" in name else masked_op, name)
