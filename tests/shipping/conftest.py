"""Real bundles of a small network: an ONNX file written by hand, compiled and run by ONNX Runtime."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from passdeploy.engines.base import CompileInput
from passdeploy.engines.onnxruntime import OnnxRuntime
from passdeploy.shipping.bundle import BundleSource, EngineSource, write_bundle
from passdeploy.targets import Target

CLASSES = ("cat", "dog", "owl", "eel", "ant")
SHAPE = (3, 12, 10)


@dataclass(frozen=True)
class Pre:
    """Duck-typed `passdeploy.data.base.Preprocess`, which would import torch."""

    size: tuple[int, int] = SHAPE[1:]
    resize: int | None = None
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.25, 0.25, 0.25)


def write_onnx(path: Path, seed: int = 0, batch: int | str = 1, width: int = 8) -> Path:
    """conv 3x3 -> relu -> global average -> linear, random weights."""
    rng = np.random.default_rng(seed)
    weights = {
        "w": rng.normal(size=(width, 3, 3, 3)).astype(np.float32),
        "b": rng.normal(size=width).astype(np.float32),
        "fc": rng.normal(size=(width, len(CLASSES))).astype(np.float32),
    }
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["images", "w", "b"], ["c"], pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["c"], ["r"]),
            helper.make_node("GlobalAveragePool", ["r"], ["g"]),
            helper.make_node("Flatten", ["g"], ["f"]),
            helper.make_node("MatMul", ["f", "fc"], ["logits"]),
        ],
        "small",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [batch, *SHAPE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, len(CLASSES)])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, str(path))
    return path


def cpu_target(batch: int = 1) -> Target:
    return Target("cpu", "a CPU", None, "onnxruntime", "fp32", batch, 1, attached=True)


def report(**changes: object) -> dict[str, object]:
    latency = {"p50": 1.5, "p90": 1.6, "p99": None, "mean": 1.5, "n": 300}
    return {
        "schema": "passdeploy.report/1",
        "status": "within_budget",
        "budget": {"asked": "2ms", "latency_ms": 2.0, "percentile": "p50", "scope": "engine"},
        "method": "pass",
        "seed": 0,
        "dense": {"accuracy": 0.93, "latency_ms": latency | {"p50": 3.0}},
        "pruned": {"accuracy": 0.925, "latency_ms": latency},
        "equivalence": {"masked_vs_thin": 1e-6, "thin_vs_onnx": 1e-6, "onnx_vs_engine": 1e-6, "top1_agreement": 1.0},
        **changes,
    }


def make_source(folder: Path, seed: int = 0, batch: int = 1, **changes: object) -> BundleSource:
    folder.mkdir(parents=True, exist_ok=True)
    path = write_onnx(folder / "model.onnx", seed, batch)
    target = cpu_target(batch)
    backend = OnnxRuntime()
    engine = backend.compile(CompileInput(path), target)
    backend.save(engine, folder / "engine")
    config = folder / "config.yaml"
    config.write_text("model: small\n")
    images = np.random.default_rng(1).random((4, *SHAPE), dtype=np.float32)
    fields: dict[str, object] = {
        "name": "small on cpu",
        "model": "small",
        "data": "made up",
        "classes": CLASSES,
        "preprocess": Pre(),
        "onnx": path,
        "engines": (EngineSource(folder / "engine", target),),
        "images": images,
        "report": report(),
        "config": config,
    }
    return BundleSource(**(fields | changes))  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> BundleSource:
    return make_source(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="session")
def sealed_bundle(source: BundleSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared: not to be changed."""
    return write_bundle(tmp_path_factory.mktemp("out") / "bundle", source)


@pytest.fixture
def bundle(sealed_bundle: Path, tmp_path: Path) -> Path:
    """A copy of one's own."""
    return Path(shutil.copytree(sealed_bundle, tmp_path / "bundle"))


@pytest.fixture
def random_images() -> Callable[[int], np.ndarray]:
    rng = np.random.default_rng(7)
    return lambda count: rng.random((count, *SHAPE), dtype=np.float32)
