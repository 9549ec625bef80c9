"""What every backend offers: compile a graph to an engine, save and load it, run and time it.

A backend is one file in this package with a subclass of `Backend` decorated by `register`. Heavy libraries are imported
inside methods, so that a backend whose parts are missing never raises at import: `available` says what is missing and
how to get it.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from passdeploy.errors import BadInput, Unavailable, nearest

if TYPE_CHECKING:
    import torch

    from passdeploy.targets import Target

LAYER_CALLS = 40
Arrays = dict[str, np.ndarray]
INPUT, OUTPUT = "images", "logits"
"""Names of a graph's input and of its output."""
TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1, "int8": 3e-1, "fp8": 3e-1}
"""Largest max|a-b| / max|a| between the ONNX file and the engine of a precision; all other proofs are in fp32."""


@dataclass(frozen=True)
class CompileInput:
    """What an engine is compiled from.

    Attributes:
        onnx: Path of the ONNX file: one float32 input ``images`` (N, 3, H, W) in [0, 1], one output ``logits``.
        exported_program: The same function as a `torch.export` program, for backends that start from it; may be None.
        samples: Real validation images (n, 3, H, W) float32 in [0, 1]: calibration and proofs.
        masked: The graph is a masked network's (`compile --masked`); a backend with plugins masks by the kernel.
    """

    onnx: Path
    exported_program: torch.export.ExportedProgram | None = None
    samples: np.ndarray | None = None
    masked: bool = False


@dataclass(frozen=True)
class Engine:
    """A compiled artefact: one file, whose bytes are what is measured and shipped.

    Attributes:
        backend: Name of the backend that made it.
        data: The file's content.
        suffix: Of the file's name, with the dot.
        meta: JSON-able facts recorded beside it: backend version, precision, batch, threads, compute capabilities, ...
    """

    backend: str
    data: bytes
    suffix: str
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def input_name(self) -> str:
        """Of the tensor that goes in: ``images``, unless the network was exported elsewhere.

        Raises:
            BadInput: Several go in.
        """
        names = list(self.meta["inputs"])
        if len(names) != 1:
            raise BadInput(f"engine: takes {len(names)} inputs ({', '.join(names)}), expected images alone")
        return str(names[0])


class Runner:
    """Executes an engine; a context manager that frees what it holds on exit."""

    def run(self, inputs: Arrays) -> Arrays:
        """Maps named input arrays to named output arrays."""
        raise NotImplementedError

    def call(self) -> None:
        """One inference on inputs that already lie where the engine wants them (scope `engine`); blocks until done.

        What `passdeploy.latency.measure` times. `bind` comes first.
        """
        raise NotImplementedError

    def bind(self, inputs: Arrays) -> None:
        """Puts the inputs of `call` in place."""
        raise NotImplementedError

    def layer_times(self, calls: int = LAYER_CALLS) -> dict[str, float] | None:
        """Mean milliseconds of each layer of a bound inference, in order, by the runtime's own names for them.

        Their sum exceeds the latency: being watched takes time, most of all of layers that take little.

        Returns:
            None where this runtime does not tell.
        """
        return None

    def close(self) -> None:
        """Frees the engine; called by ``with``."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class Backend:
    """A compiler and its run time."""

    name: ClassVar[str]
    suffix: ClassVar[str]
    precisions: ClassVar[tuple[str, ...]] = ("fp32",)
    wants_program: ClassVar[bool] = False
    """Whether `compile` starts from `CompileInput.exported_program`."""
    fresh_processes: ClassVar[bool] = True
    """Whether another process can load its engines; not where it lives in this one only."""

    def available(self, target: Target) -> str | None:
        """None when engines can be compiled for `target` here, else what is missing and how to get it."""
        raise NotImplementedError

    def runnable(self, target: Target) -> str | None:
        """None when engines for `target` can be executed and measured here, else why not."""
        return self.available(target)

    def unproven(self, target: Target) -> bool:
        """Whether its makers do not say that it supports the target: it is tried when it is asked for by name."""
        return False

    def compile(self, source: CompileInput, target: Target) -> Engine:
        """Compiles for the target's device, precision, batch and threads."""
        raise NotImplementedError

    def masks_by_kernel(self, target: Target) -> bool:
        """Whether a masked network (`CompileInput.masked`) runs the mask kernel in its engines."""
        return False

    def builds_vary(self, target: Target) -> bool:
        """Whether two builds of one graph may run different kernels, since the builder chooses by timing them."""
        return False

    def rebuild(self, source: CompileInput, target: Target) -> Engine:
        """As `compile`, but without what earlier builds left behind for later ones."""
        return self.compile(source, target)

    def graph_for(self, source: CompileInput, target: Target) -> bytes | None:
        """The ONNX graph in the target's precision, whose accuracy stands in for an engine that can't run here.

        None when the backend has no such graph.
        """
        return None

    def runner(self, engine: Engine, target: Target) -> Runner:
        """Loads an engine for execution. Raises `BadInput` when it does not fit this machine or is damaged."""
        raise NotImplementedError

    def libraries(self) -> str:
        """Versions of all that its engines and their latencies depend on: `version`, and what lies beneath."""
        return self.version()

    def save(self, engine: Engine, folder: Path) -> Path:
        """Writes the engine file and its `engine.json` (facts and SHA-256) into `folder`; returns the engine's path."""
        from passdeploy.engines.files import save_engine

        return save_engine(engine, folder)

    def version(self) -> str:
        """Version of the library behind it."""
        raise NotImplementedError


_REGISTRY: dict[str, Backend] = {}


def register(cls: type[Backend]) -> type[Backend]:
    """Registers a backend under its name."""
    _REGISTRY[cls.name] = cls()
    return cls


def backends() -> dict[str, Backend]:
    """All backends by name, whether their libraries are here or not."""
    import passdeploy.engines as package

    for module in pkgutil.iter_modules(package.__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"passdeploy.engines.{module.name}")
    return dict(sorted(_REGISTRY.items()))


def get_backend(name: str) -> Backend:
    """Raises `BadInput` with the nearest names when there is none of that name."""
    known = backends()
    if name not in known:
        raise BadInput(f"--backend {name}: no such backend{nearest(name, known)}")
    return known[name]


def require(backend: Backend, target: Target) -> None:
    """Raises `Unavailable` when the backend can't compile for the target here."""
    reason = backend.available(target)
    if reason is not None:
        raise Unavailable(f"backend {backend.name}: {reason}")


def first_available(names: Sequence[str], target: Target) -> Backend:
    """The first of `names` that can compile for the target here; where it is attached, rather one that runs, too.

    One whose makers say nothing of the target comes last.

    Raises:
        Unavailable: None can.
    """
    reasons, able = [], []
    for name in names:
        backend = get_backend(name)
        reason = backend.available(target)
        if reason is None:
            able.append(backend)
        else:
            reasons.append(f"{name}: {reason}")
    able.sort(key=lambda backend: backend.unproven(target))
    for backend in able if target.attached else ():
        if backend.runnable(target) is None:
            return backend
    if able:
        return able[0]
    raise Unavailable(f"target {target.name}: no backend can compile for it here ({'; '.join(reasons)})")
