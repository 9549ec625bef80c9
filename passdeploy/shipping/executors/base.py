"""What the runner asks of a backend, and which backend goes where."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np

from passdeploy.errors import BadInput
from passdeploy.shipping.contents import EngineInfo
from passdeploy.shipping.packages import packages
from passdeploy.shipping.sums import Refused

if TYPE_CHECKING:
    from passdeploy.kernels.interface import View

_EXECUTORS = {
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
    "tensorrt": "tensorrt",
    "tensorrt_rtx": "tensorrt",
}
"""Backend -> module of this package; any other backend goes through `passdeploy.engines` and what that imports."""
_COUNTS = ("threads", "streams")
"""Options that are numbers of something."""


class Executor:
    """A loaded engine. `run` may be called from several threads at once."""

    def run(self, images: np.ndarray) -> np.ndarray:
        """Maps exactly one batch of images (batch, C, H, W) float32 to logits (batch, classes) of its own memory."""
        raise NotImplementedError

    def run_on_device(self, images: View) -> np.ndarray:
        """Maps any number of images that lie on the GPU, (n, C, H, W) float32, to logits (n, classes) on the host."""
        raise BadInput("images: lie on a GPU; this backend takes host arrays, copy them first")

    def bind(self, images: np.ndarray) -> None:
        """Puts the input of `call` in place (what a measurement of scope `engine` needs)."""
        raise NotImplementedError

    def call(self) -> None:
        """One inference on what `bind` put in place; blocks until done. For one thread."""
        raise NotImplementedError

    def close(self) -> None:
        """Frees the engine. Nothing is running when it is called."""


def in_batches(run: Callable[[np.ndarray], np.ndarray], images: np.ndarray, batch: int) -> np.ndarray:
    """Runs any number of images (at least one) in batches of `batch`; the last is filled up with its last image."""
    count = len(images)
    if count == batch:
        return run(images)
    parts = []
    for start in range(0, count, batch):
        part = images[start : start + batch]
        held = len(part)
        if held < batch:
            part = np.concatenate([part, np.repeat(part[-1:], batch - held, axis=0)])
        parts.append(run(np.ascontiguousarray(part))[:held])
    return np.concatenate(parts)


def create(engine: EngineInfo, data: bytes, manifest: Mapping[str, Any], **options: Any) -> Executor:
    """Loads an engine from its bytes.

    Args:
        engine: As the bundle describes it.
        data: The engine file; its digest was checked on these very bytes.
        manifest: The bundle's.
        options: Settings of the backend's executor, such as ``streams`` and ``device`` of TensorRT's.

    Raises:
        BadInput: The backend has no such option, or an option is not what it must be.
        Refused: The backend is missing or does not take the engine; one line that says what to do.
    """
    module = importlib.import_module(f"passdeploy.shipping.executors.{_EXECUTORS.get(engine.backend, 'engines')}")
    known = list(inspect.signature(module.create).parameters)[3:]
    for option, value in options.items():
        if option not in known:
            raise BadInput(f"{option}=: {engine.backend} has no such option; it takes {', '.join(known) or 'none'}")
        # Without a stream every call would wait for one for ever.
        if option in _COUNTS and value is not None and not (isinstance(value, Integral) and int(value) >= 1):
            raise BadInput(f"{option}={value!r}: must be a whole number, 1 or more")
    try:
        executor: Executor = module.create(engine, data, manifest, **options)
    except ImportError as error:
        name, told = error.name or engine.backend, " ".join(str(error).split())[:200]
        wrong = "is not installed" if isinstance(error, ModuleNotFoundError) else f"cannot be imported ({told})"
        install = " ".join(packages(engine))
        raise Refused(f"engine {engine.id}: {name} {wrong}; pip install {install}") from None
    return executor
