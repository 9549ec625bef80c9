"""`masked_affine_act` as an ahead-of-time plugin of full TensorRT: the kernel's PTX goes into the engine.

Written to `tensorrt.plugin`'s documentation (TensorRT 11, "Python plugins", `register` and `aot_impl`) and to what its
published `_plugin_class.py` calls these functions with; not run so far, for want of the libraries. What goes into
it is tested: the graph (`_plugin_graph`), the entry's arguments in its PTX, the launch, and the kernel itself on the
emulator. TensorRT-RTX takes no plugins.
"""

# No `from __future__ import annotations`: TensorRT reads the types of these functions' arguments.
from typing import Any

from passdeploy.engines._plugin_graph import NAME, NAMESPACE, plugin_name
from passdeploy.kernels.geometry import ACTIVATIONS, ActivationShape


def launch(shape: tuple[int, ...], kind: str, activation: int) -> tuple[str, int, int, tuple[int, int, int, int]]:
    """How the kernel is launched for x (N, C, ...).

    Args:
        shape: Of x; fixed, since the batch of a shipped graph is.
        kind: f32, f16 or bf16.
        activation: Position in `ACTIVATIONS`.

    Returns:
        The entry's name, blocks, threads of a block, and its numbers: elements, channels, plane, activation.
    """
    images, channels, *rest = shape
    plane = 1
    for size in rest:
        plane *= size
    planned = ActivationShape(images, channels, plane, False, kind).forward(ACTIVATIONS[activation])
    numbers = (images * channels * plane, channels, plane, activation)
    return f"{NAME}_flat_{kind}", planned.grid[0], planned.threads, numbers


def ptx(capability: int) -> bytes:
    """The kernels as PTX for a compute capability (times ten), which TensorRT wants instead of machine code."""
    from passdeploy.kernels.build import compile_nvrtc

    return compile_nvrtc(NAME, capability, ptx=True).rstrip(b"\0")  # text, and NVRTC ends it as C does


def register(capability: int) -> None:
    """Makes the plugins, one per activation, known to the TensorRT of this process; once is enough.

    Args:
        capability: Of the GPU that is built for, times ten.
    """
    code = ptx(capability)
    for activation in range(len(ACTIVATIONS)):
        _register(activation, code)


def _register(activation: int, code: bytes) -> None:
    import tensorrt as trt
    import tensorrt.plugin as trtp

    name = f"{NAMESPACE}::{plugin_name(ACTIVATIONS[activation])}"
    kinds = {trt.float32: "f32", trt.float16: "f16", trt.bfloat16: "bf16"}

    @trtp.register(name)  # type: ignore[untyped-decorator]
    def describe(
        x: trtp.TensorDesc, mask: trtp.TensorDesc, scale: trtp.TensorDesc, shift: trtp.TensorDesc
    ) -> trtp.TensorDesc:
        return x.like()

    @trtp.aot_impl(name)  # type: ignore[untyped-decorator]
    def implement(
        x: trtp.TensorDesc,
        mask: trtp.TensorDesc,
        scale: trtp.TensorDesc,
        shift: trtp.TensorDesc,
        outputs: tuple[trtp.TensorDesc],
        tactic: int,
    ) -> tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymExprs]:
        shape = tuple(int(x.shape[axis]) for axis in range(len(x.shape)))  # a `Shape` is indexed, not iterated
        entry, blocks, threads, numbers = launch(shape, kinds[x.dtype], activation)
        params = trtp.KernelLaunchParams()
        params.grid_x, params.block_x, params.shared_mem = blocks, threads, 0
        extra: Any = trtp.SymIntExprs(len(numbers))
        for index, number in enumerate(numbers):
            extra[index] = trtp.SymInt32(number)
        return entry, code, params, extra
