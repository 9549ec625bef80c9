"""Runs a bundle with numpy and the backend alone: no torch, no pandas, no pydantic.

    from passdeploy.shipping.runner import load

    with load("bundle") as model:
        logits = model.run(images)

A bundle is checked before any of it is loaded: its digests, its signature when a key is given, what `bundle.json` binds
together, and whether an engine fits this machine. Once loaded, the engine must reproduce the sample outputs.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from passdeploy.errors import BadInput
from passdeploy.shipping.contents import Contents, EngineInfo, open_bundle
from passdeploy.shipping.executors.base import Executor, create, in_batches
from passdeploy.shipping.hardware import Machine, this_machine
from passdeploy.shipping.sums import Refused


class Model:
    """A loaded bundle. Safe to use from several threads; `close` waits for the calls that are under way.

    Attributes:
        contents: The bundle.
        engine: The engine that was chosen.
        classes: Class names in the order of the logits.
    """

    def __init__(self, contents: Contents, engine: EngineInfo, executor: Executor) -> None:
        self.contents = contents
        self.engine = engine
        self.classes = contents.classes
        self._output_shape = contents.output_shape
        self._shape = contents.input_shape
        self._executor: Executor | None = executor
        self._state = threading.Condition()
        self._running = 0

    @contextmanager
    def _in_use(self) -> Iterator[Executor]:
        with self._state:
            if self._executor is None:
                raise BadInput("this model is closed; load the bundle again")
            self._running += 1
            executor = self._executor
        try:
            yield executor
        finally:
            with self._state:
                self._running -= 1
                self._state.notify_all()

    def run(self, images: Any) -> np.ndarray:
        """Classifies images.

        Args:
            images: float32 (n, 3, H, W), RGB in [0, 1], or uint8 (n, H, W, 3), RGB; any n. TensorRT also takes float32
                arrays that lie on its GPU and speak the CUDA array interface (pycuda, cupy, torch).

        Returns:
            Logits (n, classes), or (n, classes, H, W) of a segmentation, float32, in the order of `classes`.

        Raises:
            BadInput: Wrong type or shape, or the model is closed.
            Refused: The GPU fails; other runtimes raise what they raise.
        """
        if hasattr(images, "__cuda_array_interface__"):
            return self._run_on_device(images)
        images = self._prepare(images)
        with self._in_use() as executor:
            if not len(images):
                return np.zeros((0, *self._output_shape), np.float32)
            return in_batches(executor.run, images, self.engine.batch)

    def _run_on_device(self, images: Any) -> np.ndarray:
        from passdeploy.kernels.interface import view

        seen = view(images, "images")
        if seen.kind != "f32" or len(seen.shape) != 4 or seen.shape[1:] != self._shape:
            raise BadInput(
                f"images: {seen.kind} {list(seen.shape)}, expected f32 [n, {', '.join(map(str, self._shape))}]"
            )
        with self._in_use() as executor:
            if not seen.shape[0]:
                return np.zeros((0, *self._output_shape), np.float32)
            return executor.run_on_device(seen)

    def _prepare(self, images: np.ndarray) -> np.ndarray:
        images = np.asarray(images)
        channels, height, width = self._shape
        if images.dtype == np.uint8 and images.shape[1:] == (height, width, channels):
            return np.ascontiguousarray(images.transpose(0, 3, 1, 2), dtype=np.float32) / np.float32(255)
        if images.dtype != np.float32 or images.shape[1:] != self._shape or images.ndim != 4:
            raise BadInput(
                f"images: {images.dtype} {list(images.shape)}, expected float32 [n, {channels}, {height}, {width}] "
                f"in [0, 1] or uint8 [n, {height}, {width}, {channels}]"
            )
        return np.ascontiguousarray(images)

    def bind(self, images: np.ndarray) -> None:
        """Puts one batch in place for `call`: a measurement of scope `engine` leaves transfers out."""
        images = self._prepare(images)
        if len(images) != self.engine.batch:
            raise BadInput(f"bind takes exactly {self.engine.batch} image(s), the engine's batch, not {len(images)}")
        with self._in_use() as executor:
            executor.bind(images)

    def call(self) -> None:
        """One inference on what `bind` put in place. For one thread."""
        if self._executor is None:
            raise BadInput("this model is closed; load the bundle again")
        self._executor.call()

    def check_samples(self) -> float:
        """Runs the sample images; returns max|a-b| / max|a| against the expected outputs.

        Raises:
            Refused: Above the engine's tolerance, or not finite, or the runtime fails on them.
        """
        images, expected = self.contents.samples()
        try:
            actual = self.run(images)
        except Refused:
            raise
        except Exception as error:  # of libraries that are missing or do not fit some tell at the first inference only
            told = " ".join(str(error).split())[:200] or type(error).__name__
            raise Refused(f"engine {self.engine.id}: cannot run the sample images here ({told})") from None
        if actual.shape != expected.shape:
            raise Refused(
                f"engine {self.engine.id}: gives outputs {list(actual.shape)}, the samples say {list(expected.shape)}"
            )
        difference = float(np.max(np.abs(actual - expected)) / max(float(np.max(np.abs(expected))), 1e-30))
        if not difference <= self.engine.tolerance:
            raise Refused(
                f"engine {self.engine.id}: does not reproduce the sample outputs here (relative difference "
                f"{difference:.1e}, allowed {self.engine.tolerance:.0e}); compile it again for this machine"
            )
        return difference

    def close(self) -> None:
        """Waits for calls under way, then frees the engine. Closing twice is fine."""
        with self._state:
            executor, self._executor = self._executor, None
            self._state.wait_for(lambda: self._running == 0)
        if executor is not None:
            executor.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def load(
    bundle: str | Path,
    *,
    key: str | Path | None = None,
    engine: str | None = None,
    machine: Machine | None = None,
    device: int | None = None,
    check_samples: bool = True,
    **options: Any,
) -> Model:
    """Loads a bundle, verified first.

    Args:
        bundle: Its folder.
        key: Public key (PEM): the bundle must be signed with its private half. None: the digests alone are checked,
            which detects corruption but not tampering.
        engine: Id of an engine, or a target's name; None: the first engine that fits this machine.
        machine: What to fit; None: this machine.
        device: The GPU to run on, as CUDA numbers those that this process sees: the engine must fit that one. TensorRT
            makes it the current one of every thread that calls. None: the first (of TensorRT: the calling thread's).
        check_samples: Whether the engine must reproduce the sample outputs before it is handed over (also a warm-up).
        options: Of the backend: ``threads`` (ONNX Runtime, OpenVINO), ``streams`` (OpenVINO, TensorRT) and
            ``cuda_graphs`` (TensorRT).

    Raises:
        BadInput: There is no such folder or GPU, or the backend has no such option or takes no such value of it.
        Refused: The bundle is not what was sealed or does not fit this machine; one line that says why.
    """
    contents = open_bundle(Path(bundle), Path(key) if key is not None else None)
    return load_contents(
        contents, engine=engine, machine=machine, device=device, check_samples=check_samples, **options
    )


def _with_one_gpu(machine: Machine, device: int) -> Machine:
    if not 0 <= device < len(machine.gpus):
        raise BadInput(f"device={device}: this machine has {len(machine.gpus)} NVIDIA GPU(s), counted from 0")
    return replace(machine, gpus=(machine.gpus[device],))


def load_contents(
    contents: Contents,
    *,
    engine: str | None = None,
    machine: Machine | None = None,
    device: int | None = None,
    check_samples: bool = True,
    **options: Any,
) -> Model:
    """Loads what has been opened and checked; the rest as for `load`."""
    if device is not None:
        machine = _with_one_gpu(machine or this_machine(), device)
        options["device"] = device
    chosen = contents.choose(engine, machine)
    executor = create(chosen, contents.sealed.read(chosen.file), contents.manifest, **options)
    model = Model(contents, chosen, executor)
    if check_samples:
        try:
            model.check_samples()
        except BaseException:
            model.close()
            raise
    return model
