"""The rival latency model: a table of single convolutions, interpolated and summed (HALP, arXiv 2110.10811).

Every distinct operator of a network is measured alone at a grid of input and output channels; a structure's latency is
the sum of what the table says of its operators. Fusion, layout changes and what lies between operators are not in it.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from passdeploy.engines.base import CompileInput, get_backend
from passdeploy.groups import Operator, channels
from passdeploy.latency.sampler import Sampler
from passdeploy.targets import Target

SHARES = (0.25, 0.5, 0.75, 1.0)
Key = tuple[Any, ...]


def single(op: Operator, cin: int, cout: int) -> bytes:
    """An ONNX graph of one operator."""
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    kh, kw = op.kernel
    if op.kind == "linear":
        weight = rng.normal(0, 0.05, (cin, cout)).astype(np.float32)
        node = helper.make_node("MatMul", ["images", "w"], ["logits"])
        shape, out = [1, cin], [1, cout]
    else:
        each = 1 if op.kind == "depthwise" else cin // op.groups
        weight = rng.normal(0, math.sqrt(2 / (each * kh * kw)), (cout, each, kh, kw)).astype(np.float32)
        group = cin if op.kind == "depthwise" else op.groups
        node = helper.make_node("Conv", ["images", "w"], ["logits"], kernel_shape=[kh, kw], strides=list(op.stride),
                                pads=[kh // 2, kw // 2] * 2, group=group)  # fmt: skip
        shape, out = [1, cin, *op.in_hw], [1, cout, *op.out_hw]
    graph = helper.make_graph(
        [node],
        "single",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, out)],
        [numpy_helper.from_array(weight, "w")],
    )
    data: bytes = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    ).SerializeToString()
    return data


class ConvolutionTable:
    """Measures all distinct operators of a network alone.

    Args:
        ops: Of the network.
        target: Attached.
    """

    def __init__(self, ops: Sequence[Operator], target: Target) -> None:
        self.ops, self.target = tuple(ops), target
        self._tables: dict[Key, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        for op in ops:
            if self._key(op) not in self._tables:
                self._tables[self._key(op)] = self._measure(op)

    @staticmethod
    def _key(op: Operator) -> Key:
        return (op.kind, op.kernel, op.stride, op.groups if op.kind == "conv" else 0, op.in_hw, op.cin, op.cout)

    def _grid(self, full: int, movable: bool) -> np.ndarray:
        if not movable:
            return np.array([full])
        return np.array(sorted({max(1, round(full * s / 4) * 4 if full >= 16 else round(full * s)) for s in SHARES}))

    def _measure(self, op: Operator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Channels in, channels out, milliseconds [in, out]."""
        depthwise = op.kind == "depthwise"
        inputs = np.array([0]) if depthwise else self._grid(op.cin, bool(op.in_units))
        outputs = self._grid(op.cout, bool(op.out_units))
        ms = np.zeros((len(inputs), len(outputs)))
        for i, cin in enumerate(inputs):
            for j, cout in enumerate(outputs):
                ms[i, j] = self._one(single(op, int(cout if depthwise else cin), int(cout)))
        return inputs, outputs, ms

    def _one(self, graph: bytes) -> float:
        backend = get_backend(self.target.backend)
        with tempfile.TemporaryDirectory(prefix="passdeploy-") as folder:
            path = Path(folder) / "single.onnx"
            path.write_bytes(graph)
            engine = backend.compile(CompileInput(onnx=path), self.target)
        shape = next(iter(engine.meta["inputs"].values()))
        with backend.runner(engine, self.target) as runner:
            runner.bind({"images": np.random.default_rng(0).random(shape, dtype=np.float32)})
            return Sampler(runner, one_thread=self.target.threads == 1, rounds=4, most=8)(runner)["dense_floor_ms"]

    def predict_many(self, w: np.ndarray) -> np.ndarray:
        """Milliseconds [n], for kept units [n, groups]."""
        total = np.zeros(len(w))
        for op in self.ops:
            cin, cout, present = channels(op, np.asarray(w, dtype=float))
            inputs, outputs, ms = self._tables[self._key(op)]
            total += present * _bilinear(inputs, outputs, ms, cin, cout)
        return total


def _bilinear(xs: np.ndarray, ys: np.ndarray, values: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Interpolates in a grid; below its first line in proportion to the first cell."""
    rows = np.stack([_linear(ys, values[i], y) for i in range(len(xs))], axis=0)
    return np.array([_linear(xs, rows[:, k], np.array([x[k]]))[0] for k in range(len(x))])


def _linear(xs: np.ndarray, values: np.ndarray, x: np.ndarray) -> np.ndarray:
    if len(xs) == 1:
        return np.full(len(x), values[0])
    i = np.clip(np.searchsorted(xs, x) - 1, 0, len(xs) - 2)
    share = (x - xs[i]) / (xs[i + 1] - xs[i])
    result: np.ndarray = np.maximum(values[i] + share * (values[i + 1] - values[i]), 0.1 * values.min())
    return result
