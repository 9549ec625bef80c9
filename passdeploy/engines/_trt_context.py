"""How an engine of TensorRT or TensorRT-RTX is made ready to run: the same where it is measured and where it is served.

Imports nothing heavy, since `passdeploy.shipping.runner` comes here too.
"""

from __future__ import annotations

from typing import Any

from passdeploy.errors import BadInput


def context_of(trt: Any, engine: Any) -> Any:
    """An `IExecutionContext` whose first inference of a shape already runs the kernels that are meant for it.

    Where an engine has dynamic axes, TensorRT-RTX compiles kernels for each shape on the machine: by default beside the
    first inferences, which run a slower fallback meanwhile. A CUDA graph that is captured then keeps the fallback for
    good.

    Args:
        trt: The module `tensorrt` or `tensorrt_rtx`; the former has no such kernels.
        engine: Its `ICudaEngine`.

    Raises:
        BadInput: There is no memory for what lies between the engine's layers.
    """
    strategies = getattr(trt, "DynamicShapesKernelSpecializationStrategy", None)
    if strategies is None:
        context = engine.create_execution_context()
    else:
        config = engine.create_runtime_config()
        config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
        context = engine.create_execution_context(config)
    if context is None:  # all that the bindings say of it
        raise BadInput(
            f"the GPU has no room for the {engine.device_memory_size_v2 / 2**20:.0f} MiB that the engine works in; "
            "take a smaller --batch, or end what else uses the GPU"
        )
    return context
