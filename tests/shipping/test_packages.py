from __future__ import annotations

from typing import Any

import pytest

from passdeploy.engines.base import backends
from passdeploy.shipping.contents import EngineInfo
from passdeploy.shipping.packages import BESIDE, DISTRIBUTIONS, packages

GPU = {"compute_capabilities": ["9.0"]}


def made(backend: str, version: str, requires: dict[str, Any], meta: dict[str, Any] | None = None) -> EngineInfo:
    return EngineInfo(
        id="e", file="f", sha256="", onnx_sha256="", target="t", backend=backend, backend_version=version,
        precision="fp16", batch=1, threads=1, tolerance=0.1, requires=requires, meta=meta or {},
    )  # fmt: skip


@pytest.mark.parametrize(("engine", "expected"), [
    (made("onnxruntime", "1.27.0", {}), "onnxruntime==1.27.0"),
    (made("onnxruntime", "1.27.0", GPU), "onnxruntime-gpu==1.27.0"),
    (made("onnxruntime_tensorrt", "1.27.0", GPU), "onnxruntime-gpu==1.27.0"),
    (made("openvino", "2026.1.0", {}), "openvino==2026.1.0"),
    (made("tensorrt", "11.0.0.114", GPU), "tensorrt==11.0.0.114 cuda-bindings"),
    (made("tensorrt_rtx", "1.7.1.116", GPU), "tensorrt-rtx-cu13==1.7.1.116 cuda-bindings"),
    (made("inductor", "2.13.0+cpu", {}), "torch==2.13.0"),
    (made("torch_tensorrt", "2.13.0+cu130", GPU, {"torch_tensorrt": "2.13.1+cu130", "tensorrt": "11.1.0"}),
     "torch-tensorrt==2.13.1 torch==2.13.0 tensorrt==11.1.0"),
    (made("openvino", "unknown", {}), "openvino"),
    (made("someones", "3", {}), "someones==3"),
])  # fmt: skip
def test_names_are_pips(engine: EngineInfo, expected: str) -> None:
    assert " ".join(packages(engine)) == expected


def test_backends_are_called_as_they_call_themselves() -> None:
    assert set(BESIDE) < set(DISTRIBUTIONS) <= set(backends())
