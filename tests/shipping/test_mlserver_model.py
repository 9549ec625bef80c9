from __future__ import annotations

import asyncio
import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import pytest

from passdeploy.shipping.runner import load
from passdeploy.shipping.servers import mlserver


class Failed(Exception):
    def __init__(self, told: str, status_code: int = 400) -> None:
        super().__init__(told)
        self.status_code = status_code


@pytest.fixture
def runtime(sealed_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The runtime over the bundle; of MLServer's own only what it calls."""
    codec = SimpleNamespace(decode_input=lambda given: given, encode_output=lambda name, array: array)
    names: dict[str, dict[str, Any]] = {
        "mlserver": {"MLModel": SimpleNamespace},
        "mlserver.codecs": {"NumpyCodec": codec},
        "mlserver.errors": {"InferenceError": type("Wrong", (Failed,), {}), "MLServerError": Failed},
        "mlserver.types": {"InferenceRequest": SimpleNamespace, "InferenceResponse": SimpleNamespace},
    }
    for name, attributes in names.items():
        module = ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    path = Path(mlserver.__file__).with_name("mlserver_model.py")
    spec = importlib.util.spec_from_file_location("served", path)
    assert spec is not None and spec.loader is not None
    served = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(served)
    with load(sealed_bundle) as model:
        yield served.PassdeployRuntime(_model=model, _output="logits", name="net", version="1")


def predict(runtime: Any, images: np.ndarray) -> np.ndarray:
    answer = asyncio.run(runtime.predict(SimpleNamespace(inputs=[images], id="1")))
    outputs: np.ndarray = answer.outputs[0]
    return outputs


def test_a_python_that_is_too_old_is_said(runtime: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 12))
    with pytest.raises(Failed, match=r"needs Python 3\.11 or newer, and MLServer runs on"):
        asyncio.run(runtime.load())


def test_bytes_are_scaled_as_the_engine_expects(runtime: Any) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 12, 10, 3), dtype=np.uint8)
    floats = images.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
    assert np.array_equal(predict(runtime, images), predict(runtime, floats))
    assert np.array_equal(predict(runtime, floats.astype(np.float64)), predict(runtime, floats))


@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_whole_numbers_in_the_layout_of_floats_are_refused(runtime: Any, dtype: type) -> None:
    with pytest.raises(Failed, match="expected float32") as error:
        predict(runtime, np.zeros((1, 3, 12, 10), dtype))
    assert error.value.status_code == 400


def test_what_fails_in_the_engine_is_not_the_clients_error(runtime: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(images: np.ndarray) -> NoReturn:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(runtime._model, "run", run)
    with pytest.raises(Failed, match="RuntimeError: out of memory") as error:
        predict(runtime, np.zeros((1, 3, 12, 10), np.float32))
    assert error.value.status_code == 500
