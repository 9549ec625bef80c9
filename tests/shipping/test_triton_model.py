"""The Python backend's model as Triton starts it: which GPU an instance gets; of Triton's own only what it calls."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from passdeploy.shipping import contents, runner
from passdeploy.shipping.contents import EngineInfo
from passdeploy.shipping.executors.base import Executor
from passdeploy.shipping.hardware import Gpu, Machine
from passdeploy.shipping.repository import write_repository
from tests.shipping.test_repository import gpu_bundle

MACHINE = Machine("x86_64", frozenset(), (Gpu("Tesla T4", "7.5"), Gpu("NVIDIA A100", "8.0")), "13.0")
Asked = list[tuple[str, dict[str, Any]]]


class Tensor:
    def __init__(self, name: str, array: np.ndarray) -> None:
        self.name, self.array = name, array

    def as_numpy(self) -> np.ndarray:
        return self.array

    def to_dlpack(self) -> np.ndarray:
        return self.array

    @classmethod
    def from_dlpack(cls, name: str, array: np.ndarray) -> Tensor:
        return cls(name, array)


class Failed(Exception):
    """Triton's for a model that is not ready."""


class Loaded(Executor):
    """Knows the answers to the samples, which it is asked in order."""

    def __init__(self, answers: np.ndarray) -> None:
        self.answers = list(answers)

    def run(self, images: np.ndarray) -> np.ndarray:
        return self.answers.pop(0)[None]

    def close(self) -> None: ...


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a plan for each of the two GPUs."""
    folder = tmp_path_factory.mktemp("triton")
    bundle = gpu_bundle(folder, ("tensorrt", "a100", "8.0"), ("tensorrt", "t4", "7.5"))
    write_repository(folder / "models", bundle, "triton", name="net", kind="python")
    return folder / "models/net"


@pytest.fixture
def asked(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Asked:
    """Target and options of each engine that was loaded."""
    seen: Asked = []

    def create(engine: EngineInfo, data: bytes, manifest: Mapping[str, Any], **options: Any) -> Executor:
        seen.append((engine.target, options))
        _, expected = contents.open_bundle(repository / "1/bundle").samples()
        return Loaded(expected)

    monkeypatch.setattr(runner, "create", create)
    for module in (runner, contents):
        monkeypatch.setattr(module, "this_machine", lambda: MACHINE)
    return seen


def start(repository: Path, monkeypatch: pytest.MonkeyPatch, kind: str, number: int) -> Any:
    module: Any = ModuleType("triton_python_backend_utils")
    vars(module).update(Tensor=Tensor, TritonModelException=Failed, TritonError=SimpleNamespace)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(sys, "path", [*sys.path])  # the model puts its own runner first
    spec = importlib.util.spec_from_file_location("served_by_triton", repository / "1/model.py")
    assert spec is not None and spec.loader is not None
    served = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(served)
    config = {"name": "net", "input": [{"name": "images"}], "output": [{"name": "logits"}]}
    model = served.TritonPythonModel()
    given = {"model_instance_kind": kind, "model_instance_device_id": str(number)}  # Triton's are all strings
    model.initialize({"model_config": json.dumps(config), "model_name": "net", "model_version": "1", **given})
    return model


def test_a_python_that_is_too_old_is_the_models_reason(
    repository: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 12))
    with pytest.raises(Failed, match=r"needs Python 3\.11 or newer.*--kind onnxruntime"):
        start(repository, monkeypatch, "CPU", 0)
    assert not asked


def test_an_instance_of_a_gpu_runs_on_that_gpu(repository: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (0, 1):
        start(repository, monkeypatch, "GPU", number).finalize()
    assert asked == [("t4", {"device": 0}), ("a100", {"device": 1})]


def test_without_a_gpu_of_its_own_nothing_is_asked_for(
    repository: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(repository, monkeypatch, "CPU", 0).finalize()
    assert asked == [("t4", {})], "what fits the first GPU, as everywhere"


def test_a_gpu_that_is_not_there_is_the_models_reason(
    repository: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Failed, match=r"^device=2: this machine has 2 NVIDIA GPU\(s\), counted from 0$"):
        start(repository, monkeypatch, "GPU", 2)
    assert asked == []
