"""An engine whose latency is written down, and a network and data small enough to run the whole pipeline in seconds.

The engine is real: it is compiled and run by ONNX Runtime. Only its latency comes from a script: multiplications in
steps of eight channels plus a constant per operator, with noise, drift and a few disturbed blocks. All of it is a
function of the graph and of the turn in a comparison, never of the clock, so that two runs measure the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from passdeploy import data as datasets
from passdeploy import export, models, onnx_export, onnx_slicer
from passdeploy.data.base import ArraySplit, Augmentation, ImageData, Preprocess
from passdeploy.engines.base import Engine, Runner, register
from passdeploy.engines.onnxruntime import OnnxRuntime, OrtRunner
from passdeploy.models.cifar_resnet import CifarResNet

if TYPE_CHECKING:
    from passdeploy.export import OnnxSlicer
    from passdeploy.pipeline import Run
    from passdeploy.reporting.schema import Report
    from passdeploy.targets import Target

STEP = 8
MACS_PER_SECOND = 2e10
INT8_FASTER = 2.5
"""How many times as many multiplications a second in a graph with quantise/dequantise pairs."""
SECONDS_PER_OPERATOR = 10e-6
NOISE, DRIFT = 0.003, 0.02
DISTURBED_EVERY = 23


def latency(onnx_bytes: bytes) -> float:
    """Scripted seconds of one inference of an ONNX graph."""
    import onnx

    model = onnx.shape_inference.infer_shapes(onnx.load_model_from_string(onnx_bytes))
    weights = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    quantised = [node for node in model.graph.node if node.op_type == "DequantizeLinear"]
    weights |= {node.output[0]: weights[node.input[0]] for node in quantised if node.input[0] in weights}
    rate = MACS_PER_SECOND * (INT8_FASTER if quantised else 1)
    shapes = {
        value.name: [d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*model.graph.value_info, *model.graph.output)
    }

    def steps(channels: int) -> int:
        return -(-channels // STEP) * STEP

    seconds = 0.0
    for node in model.graph.node:
        if node.op_type == "Conv":
            cout, cin, *kernel = weights[node.input[1]]
            per_image = int(np.prod(shapes[node.output[0]][2:])) * int(np.prod(kernel))
            seconds += per_image * steps(cin) * steps(cout) / rate
            seconds += SECONDS_PER_OPERATOR
        elif node.op_type in ("Gemm", "MatMul"):
            seconds += SECONDS_PER_OPERATOR
    return seconds


class _Turns:
    """Counts the turns of a comparison: a block counts when the engine is not the one that had the last turn.

    Warm-up calls one engine again and again, for as long as the clock says; it must not move the script on.
    """

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.turn, self.last = 0, -1

    def next(self, runner: int) -> int:
        if runner != self.last:
            self.turn, self.last = self.turn + 1, runner
        return self.turn


TURNS = _Turns()
LOADED: list[str] = []
"""SHA-256 of every engine that was loaded to be run or measured."""


class ScriptedRunner(OrtRunner):
    """Runs for real; says of a block of calls how long the script says it took."""

    seconds: float

    def block(self, seconds: float, calls: int) -> list[float]:
        turn = TURNS.next(id(self))
        seed = hashlib.sha256(f"{self.seconds:.12g} {turn}".encode()).digest()
        noise = np.random.default_rng(int.from_bytes(seed[:8], "big")).normal(0, NOISE, calls)
        drift = 1 + DRIFT * np.sin(turn / 14)
        disturbed = 1.5 if turn % (2 * DISTURBED_EVERY) in (31, 32) else 1.0
        return [float(x) for x in self.seconds * drift * disturbed * (1 + np.abs(noise))]

    def layer_times(self, calls: int = 1) -> dict[str, float]:
        return {f"network.layer{i}.conv/Conv": 1e3 * self.seconds / 4 for i in range(4)} | {"ReorderInput": 0.001}


@register
class Scripted(OnnxRuntime):
    """ONNX Runtime with a scripted latency."""

    name: ClassVar[str] = "scripted"
    fresh_processes: ClassVar[bool] = False

    def version(self) -> str:
        return "1"

    def runner(self, engine: Engine, target: Target) -> Runner:
        runner = super().runner(engine, target)
        assert isinstance(runner, OrtRunner)
        runner.__class__ = ScriptedRunner
        assert isinstance(runner, ScriptedRunner)
        runner.seconds = latency(engine.data)
        TURNS.start()
        LOADED.append(hashlib.sha256(engine.data).hexdigest())
        return runner


@models.register("tiny-resnet")
def tiny_resnet(num_classes: int = 3) -> nn.Module:
    """Five residual blocks, three of which can go."""
    return CifarResNet((2, 2, 1), num_classes, widths=(16, 16, 24))


SIZE = (16, 12)


def stripes(count: int, seed: int) -> ArraySplit:
    """Stripes across, down and aslant, noisy."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count)
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    directions = np.stack([rows, columns, (rows + columns) / np.sqrt(2)])[labels]
    phase = rng.uniform(0, 2 * np.pi, (count, 1, 1))
    waves = 0.5 + 0.3 * np.sin(directions * 1.3 + phase)
    colours = rng.uniform(0.5, 1.0, (count, 3, 1, 1))
    pictures = waves[:, None] * colours + rng.normal(0, 0.06, (count, 3, *SIZE))
    pixels = torch.from_numpy((pictures.clip(0, 1) * 255).astype(np.uint8))
    mislabelled = rng.random(count) < 0.1  # so that no accuracy is 1
    return ArraySplit(pixels, torch.from_numpy(np.where(mislabelled, (labels + 1) % 3, labels)))


@datasets.register("stripes")
def data() -> ImageData:
    """The stripes as a data set."""
    return ImageData(
        name="stripes",
        classes=("across", "down", "aslant"),
        preprocess=Preprocess(SIZE, mean=(0.4, 0.4, 0.4), std=(0.25, 0.25, 0.25)),
        augmentation=Augmentation(flip=False, shift=1),
        train=stripes(256, 1),
        val=stripes(72, 2),
        test=stripes(90, 3),
        licence="CC0-1.0",
    )


SETTINGS = {
    "backend": "scripted",
    "train_batch": 32,
    "epochs": 2,
    "dense": {"epochs": 4, "min_steps": 40},
    "search": {"epochs": 1, "min_steps": 60},
    "finetune": {"min_steps": 30},
    # Nothing is decided by the clock: as many structures as there may be, however long they take.
    "profile": {"seconds": 1e6, "structures": 30, "cache": "off"},
    "alternatives": False,
}
"""Configuration of a run that takes seconds."""


def start(out: Path, **settings: Any) -> Run:
    """A run of the tiny network on the stripes, not yet started; `settings` go on top of `SETTINGS`."""
    from passdeploy.config import make_config, merge
    from passdeploy.console import Ui
    from passdeploy.pipeline import Run

    fresh = settings.pop("fresh", False)
    values = merge({**SETTINGS, "model": "tiny-resnet", "data": "stripes", "latency": "2x"}, settings)
    return Run(make_config(values), out, Ui(quiet=True), data=data(), fresh=fresh)


def run(out: Path, **settings: Any) -> list[Report]:
    """Runs the tiny network on the stripes; one report per budget."""
    running = start(out, **settings)
    running.slicer = slicer(running)  # type: ignore[misc]
    with exported_once():
        return running.run()


_EXPORTED: dict[str, bytes] = {}


@contextmanager
def exported_once() -> Iterator[None]:
    """Runs of one seed end in one network, whose export takes longer than all else in them: it is kept."""
    real = onnx_export.export_model

    def kept(model: nn.Module, *given: Any) -> Any:
        digest = hashlib.sha256(f"{model} {given}".encode())
        for name, value in model.state_dict().items():
            digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
        key = digest.hexdigest()
        if key not in _EXPORTED:
            _EXPORTED[key] = real(model, *given).SerializeToString()
        return onnx.load_model_from_string(_EXPORTED[key])

    with pytest.MonkeyPatch.context() as patch:
        for module in (export, onnx_slicer):  # they have it under a name of their own
            patch.setattr(module, "export_model", kept)
        yield


_SLICERS: dict[str, OnnxSlicer] = {}


def slicer(running: Run) -> OnnxSlicer:
    """The run's own, made once for the same weights: the two exports behind it take seconds."""
    from passdeploy.stages.common import slicer as export_dense
    from passdeploy.workspace import json_digest

    running.stage("dense")
    state = {name: tensor.tolist() for name, tensor in running.dense_state().items()}
    key = json_digest(state)
    if key not in _SLICERS:
        _SLICERS[key] = export_dense(running)
    return _SLICERS[key]
