"""What several backends need: the facts of an ONNX file, checks that an engine fits its target, batching."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from passdeploy.engines.base import Arrays, CompileInput, Engine
from passdeploy.errors import BadInput, PassdeployError

if TYPE_CHECKING:
    from passdeploy.targets import Target

_log = logging.getLogger(__name__)
_said: set[str] = set()
Shapes = dict[str, list[int]]
"""Tensor name -> shape; -1 where an axis is dynamic."""


@dataclass(frozen=True)
class Graph:
    """An ONNX file in one piece, with the shapes of what goes in and out (all float32)."""

    data: bytes
    inputs: Shapes
    outputs: Shapes


def beneath(version: str, packages: tuple[str, ...]) -> str:
    """A backend's version and those of what it builds with: engines and latencies change with either."""
    from passdeploy.environment import versions

    found = versions(packages)
    return ", ".join([version, *(f"{name} {found[name]}" for name in packages if name in found)])


def missing(module: str, install: str) -> str | None:
    """None when `module` can be imported (it is not), else what is missing and how to get it."""
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        found = None
    return None if found else f"{module} is not installed; pip install {install}"


def cpu_reason(target: Target, precisions: tuple[str, ...]) -> str | None:
    """Why a CPU backend with these precisions can't serve the target; None when it can."""
    from passdeploy.environment import usable_cores

    if target.precision not in precisions:
        why = ", which a CPU computes in fp32" if target.precision in ("fp16", "bf16") else ""
        return f"{target.precision} is not offered on a CPU{why}; use --precision {' or '.join(precisions)}"
    cores = usable_cores()
    if not 1 <= target.threads <= cores:
        return f"--threads {target.threads}: this machine lets a process use 1 to {cores}"
    return None


def _shapes(values: Any, path: Path) -> Shapes:
    from onnx import TensorProto

    shapes = {}
    for value in values:
        tensor = value.type.tensor_type
        if tensor.elem_type != TensorProto.FLOAT:
            kind = TensorProto.DataType.Name(tensor.elem_type)
            raise BadInput(f"{path}: {value.name!r} is {kind}, expected float32 images in and float32 logits out")
        shapes[value.name] = [d.dim_value if d.HasField("dim_value") else -1 for d in tensor.shape.dim]
    return shapes


def read_graph(source: CompileInput, target: Target) -> Graph:
    """Reads the ONNX file, external data included, and checks it against the target's batch.

    Raises:
        BadInput: Not a readable ONNX file, other than float32 inputs, or exported for another batch size.
    """
    import onnx
    from onnx.external_data_helper import load_external_data_for_model, uses_external_data

    path = source.onnx
    try:
        data = path.read_bytes()
        model = onnx.load_model_from_string(data)
        if any(uses_external_data(tensor) for tensor in model.graph.initializer):
            load_external_data_for_model(model, str(path.parent))
            data = model.SerializeToString()
    except Exception as error:
        raise BadInput(f"{path}: cannot be read as ONNX ({one_line(error)}); export it again") from None
    if not model.graph.input or not model.graph.output:
        raise BadInput(f"{path}: an ONNX graph without inputs or outputs; export it again")
    initialisers = {tensor.name for tensor in model.graph.initializer}
    inputs = _shapes([v for v in model.graph.input if v.name not in initialisers], path)
    for name, shape in inputs.items():
        if shape and shape[0] not in (-1, target.batch):
            raise BadInput(
                f"{path}: input {name!r} was exported for batch {shape[0]}, the target asks for {target.batch}; "
                f"export it again with --batch {target.batch}"
            )
    return Graph(data, inputs, _shapes(model.graph.output, path))


def facts(target: Target, version: str, graph: Graph, calibrated: CompileInput | None = None) -> dict[str, Any]:
    """What every engine records about itself; with the digest of the images that `calibrated` it."""
    digest = {}
    if calibrated is not None and calibrated.samples is not None and target.precision in ("int8", "fp8"):
        from passdeploy.engines._quantize import calibration_images

        batch = next(iter(graph.inputs.values()))[0]
        digest["calibration_sha256"] = digest_images(calibration_images(calibrated.samples, batch))
    return digest | {
        "version": version,
        "precision": target.precision,
        "batch": target.batch,
        "inputs": graph.inputs,
        "outputs": graph.outputs,
    }


def check_fits(engine: Engine, target: Target, backend: str, *, settings: tuple[str, ...] = ()) -> None:
    """Refuses an engine that was compiled for something else than `target`.

    Args:
        engine: As loaded.
        target: What it shall run on.
        backend: Name of the backend that is asked.
        settings: Fields of the target that must agree besides precision and batch.

    Raises:
        BadInput: Names the setting, both values and the fix.
    """
    if engine.backend != backend:
        raise BadInput(f"engine: made by backend {engine.backend}, not {backend}; use --backend {engine.backend}")
    for key in ("precision", "batch", *settings):
        made, asked = engine.meta.get(key), getattr(target, key)
        if made != asked:
            advice = f"compile it again with --{key} {asked} or run it with --{key} {made}"
            if key == "compute_capability":
                advice = "compile it again for this GPU"
            raise BadInput(f"engine: compiled for {key} {made}, the target asks for {asked}; {advice}")


def check_inputs(inputs: Mapping[str, np.ndarray], shapes: Mapping[str, list[int]]) -> None:
    """Refuses arrays whose names, ranks, sizes (the batch axis aside) or types are not the engine's."""
    if set(inputs) != set(shapes):
        raise BadInput(f"engine: expects inputs {sorted(shapes)}, got {sorted(inputs)}")
    for name, shape in shapes.items():
        array = inputs[name]
        if array.dtype != np.float32:
            raise BadInput(f"engine: input {name!r} must be float32, got {array.dtype}")
        same = array.ndim == len(shape) and all(w in (-1, g) for w, g in zip(shape[1:], array.shape[1:], strict=True))
        if not same or len(array) == 0:
            raise BadInput(f"engine: input {name!r} must have shape {shape}, got {list(array.shape)}")


def run_in_batches(run: Callable[[Arrays], Arrays], inputs: Arrays, batch: int) -> Arrays:
    """Runs any number of images through an engine of fixed `batch`; the last batch is filled up with its last image."""
    count = len(next(iter(inputs.values())))
    if count == batch:
        return run(inputs)
    parts = []
    for start in range(0, count, batch):
        chunk = {name: array[start : start + batch] for name, array in inputs.items()}
        held = min(batch, count - start)
        if held < batch:
            chunk = {k: np.concatenate([v, np.repeat(v[-1:], batch - held, axis=0)]) for k, v in chunk.items()}
        parts.append({name: np.array(array[:held]) for name, array in run(chunk).items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@contextmanager
def told(what: str) -> Iterator[None]:
    """What a runtime raises for something that loads and does not run, as for want of memory, is said in one line.

    Raises:
        BadInput: That it cannot be run, and why.
    """
    try:
        yield
    except PassdeployError:
        raise
    except Exception as error:  # ONNX Runtime's are no RuntimeError
        if isinstance(error, RuntimeError) or type(error).__module__.startswith("onnxruntime"):
            raise BadInput(f"{what} cannot be run: {one_line(error)}") from error
        raise


PLAINLY = "{}: the inference can't be captured as a CUDA graph and is timed kernel by kernel, which takes longer: {}"
"""What is said of an engine that no graph can hold: by whom it is run, and why."""


def say_once(remark: str) -> None:
    """Logs what a user should know and can go on with; a run that builds dozens of engines says it once."""
    if remark not in _said:
        _said.add(remark)
        _log.warning("passdeploy: %s", remark)


def one_line(error: BaseException | str, limit: int = 300) -> str:
    """An exception's text in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


def digest_images(images: np.ndarray) -> str:
    """SHA-256 over shape and pixels."""
    return hashlib.sha256(repr(images.shape).encode() + images.tobytes()).hexdigest()


WARM_CALLS = 5
"""Calls whose layers are not counted: they find cold caches."""


def middle(values: Sequence[float]) -> float:
    """Mean of the middle half: profilers note whole microseconds, of which a median would be one too."""
    quarter = len(values) // 4
    return statistics.fmean(sorted(values)[quarter : len(values) - quarter])
