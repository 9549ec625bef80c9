"""The width steps of a target: how many channels its kernels compute at a time, found by measuring.

Latency is a staircase in width: a kernel for sixteen channels takes as long for seventeen as for thirty-two. How wide
a tread is depends on the machine's vectors, the library and the kind of operator, so it is swept with single
operators (a few in a row, so that they stand out from the rest of the graph), through the very backend that compiles
the engines.
"""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from passdeploy.engines.base import CompileInput, get_backend
from passdeploy.errors import NotWritten
from passdeploy.latency.measure import Settings, Timed, interleave
from passdeploy.targets import Target, cpu_stamp
from passdeploy.user_cache import user_cache
from passdeploy.workspace import write_json

SCHEMA = "passdeploy.steps/1"
STEPS = (4, 8, 16, 32, 64)
WIDTHS = (36, 40, 44, 48, 52, 56, 60, 64, 68, 72, 80, 88, 96, 112, 128)
CHANNELS, SIDE, REPEATS = 64, 14, 3
FAMILIES = {"conv 3x3": 3, "conv 1x1": 1}
SETTINGS = Settings(pairs=4, block_s=0.003, block_calls=2, warmup_s=0.002, retries=0.0, percentiles=(), max_s=20)
# Not attached, not measured: NVIDIA's advice for tensor cores ("Deep Learning Performance Guide": 8 for half precision,
# 16 for 8 bits; TensorRT pads INT8 to 32, NVIDIA/TensorRT#1310), and the vector width of AVX2 elsewhere.
TABLE: Mapping[str, int] = {"fp32": 8, "fp16": 8, "bf16": 8, "int8": 32, "fp8": 32}


@dataclass(frozen=True)
class Steps:
    """Width steps by kind of operator.

    Attributes:
        families: Channels per step.
        curves: Per family, latency over the narrowest one's, by width; empty when taken from the table.
        measured: Whether they were swept on the target, or taken from the table of what is usual.
    """

    families: Mapping[str, int]
    curves: Mapping[str, Sequence[tuple[int, float]]]
    measured: bool

    @property
    def candidates(self) -> tuple[int, ...]:
        """Steps for `passdeploy.latency.model.LatencyModel.fit` to choose among: those found, and the vector widths of
        AVX2 and AVX-512, should the sweep have been disturbed (whole engines decide)."""
        return tuple(sorted({*self.families.values(), 8, 16}))

    def to_json(self) -> dict[str, Any]:
        """JSON-able."""
        return {"schema": SCHEMA, **asdict(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Steps:
        """Raises ValueError, KeyError or TypeError when it is not such a record."""
        if data["schema"] != SCHEMA:
            raise ValueError(f"schema is {data['schema']!r}")
        curves = {k: [(int(w), float(ms)) for w, ms in v] for k, v in data["curves"].items()}
        return cls({k: int(v) for k, v in data["families"].items()}, curves, bool(data["measured"]))


def from_table(precision: str) -> Steps:
    """What is usual for a precision, for targets that nothing can be measured on."""
    return Steps(dict.fromkeys(FAMILIES, TABLE.get(precision, 8)), {}, False)


def find_step(curve: Sequence[tuple[int, float]], steps: Sequence[int] = STEPS) -> int:
    """The width of the treads of a staircase.

    Args:
        curve: (width, latency) pairs.
        steps: Candidates. The smallest that explains the curve nearly as well as the best one is taken.
    """
    widths = np.array([w for w, _ in curve], dtype=float)
    latencies = np.array([ms for _, ms in curve])
    misfits = {}
    for step in steps:
        rounded = np.ceil(widths / step) * step
        design = np.stack([np.ones_like(rounded), rounded], axis=1) / latencies[:, None]
        solution, *_ = np.linalg.lstsq(design, np.ones_like(latencies), rcond=None)
        misfits[step] = float(np.mean(np.abs(design @ solution - 1)))
    best = min(misfits.values())
    return next(step for step in sorted(steps) if misfits[step] <= 1.25 * best + 0.002)


def chain(width: int, kernel: int, batch: int = 1) -> bytes:
    """An ONNX graph of a few convolutions to `width` channels and back, behind a first layer."""
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    nodes: list[Any] = []
    weights: list[Any] = []

    def conv(source: str, cin: int, cout: int, k: int, stride: int) -> str:
        name = f"x{len(nodes)}"
        array = rng.normal(0, math.sqrt(2 / (cin * k * k)), (cout, cin, k, k)).astype(np.float32)
        weights.append(numpy_helper.from_array(array, name + "_w"))
        nodes.append(helper.make_node("Conv", [source, name + "_w"], [name], kernel_shape=[k, k],
                                      strides=[stride, stride], pads=[k // 2] * 4))  # fmt: skip
        nodes.append(helper.make_node("Relu", [name], [name + "_r"]))
        return name + "_r"

    x = conv("images", 3, CHANNELS, 3, 2)
    for _ in range(REPEATS):
        x = conv(conv(x, CHANNELS, width, kernel, 1), width, CHANNELS, kernel, 1)
    nodes.append(helper.make_node("GlobalAveragePool", [x], ["pooled"]))
    nodes.append(helper.make_node("Flatten", ["pooled"], ["logits"]))
    image = helper.make_tensor_value_info("images", TensorProto.FLOAT, [batch, 3, 2 * SIDE, 2 * SIDE])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, CHANNELS])
    graph = helper.make_graph(nodes, "sweep", [image], [logits], weights)
    data: bytes = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    ).SerializeToString()
    return data


def sweep(open_chain: Callable[[int, int], Timed], settings: Settings = SETTINGS) -> Steps:
    """Sweeps all families.

    Args:
        open_chain: (width, kernel) -> a runner of `chain(width, kernel)`, ready to be timed.
        settings: Of the measurement.
    """
    families, curves = {}, {}
    for family, kernel in FAMILIES.items():
        runners = {str(width): open_chain(width, kernel) for width in WIDTHS}
        measured = interleave(runners, settings).measurements
        least = min(m.floor for m in measured.values())
        curves[family] = [(int(width), round(m.floor / least, 4)) for width, m in measured.items()]
        families[family] = find_step(curves[family])
    return Steps(families, curves, True)


def measure_steps(target: Target) -> Steps:
    """Sweeps an attached target through its backend.

    Raises:
        PassdeployError: The backend can't compile or run here.
    """
    backend = get_backend(target.backend)
    images = np.random.default_rng(0).random((target.batch, 3, 2 * SIDE, 2 * SIDE), dtype=np.float32)
    opened: list[Any] = []

    def open_chain(width: int, kernel: int) -> Timed:
        with tempfile.TemporaryDirectory(prefix="passdeploy-") as folder:
            path = Path(folder) / "chain.onnx"
            path.write_bytes(chain(width, kernel, target.batch))
            engine = backend.compile(CompileInput(onnx=path, samples=images), target)
        runner = backend.runner(engine, target)
        opened.append(runner)
        runner.bind({"images": images})
        return runner

    try:
        return sweep(open_chain)
    finally:
        for runner in opened:
            runner.close()


def cache_path(target: Target) -> Path:
    """Where the steps of a target are kept: in the user's cache folder, by everything that could change them."""
    parts = [target.backend, get_backend(target.backend).libraries(), target.device, target.precision,
             f"b{target.batch}", f"t{target.threads}", cpu_stamp()]  # fmt: skip
    name = "_".join("".join(c if c.isalnum() or c in ".-" else "-" for c in part) for part in parts)
    return user_cache() / "steps" / f"{name}.json"


def steps_of(target: Target, cache: str = "use") -> Steps:
    """The steps of a target: from the cache, measured, or from the table.

    Args:
        target: Whose.
        cache: As for the latency model (`passdeploy.config.ProfileConfig`): ``use``, ``refresh`` or ``off``.

    The table is for what is not attached, and for compilers that take so long (AOTInductor: ten seconds and more a
    graph) that a sweep would take longer than the profile itself.
    """
    backend = get_backend(target.backend)
    if not target.attached or backend.wants_program or backend.runnable(target) is not None:
        return from_table(target.precision)
    path = cache_path(target)
    if cache == "use":
        try:
            return Steps.from_json(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass  # not there, or not readable: measured again
    steps = measure_steps(target)
    if cache == "off":
        return steps
    with contextlib.suppress(NotWritten):  # a cache that can't be written is no reason to fail
        write_json(path, steps.to_json())
    return steps
