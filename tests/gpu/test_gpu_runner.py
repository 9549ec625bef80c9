"""The torch-free runner on an attached NVIDIA GPU: streams, CUDA graphs, threads, without torch in the process."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from passdeploy.engines.base import CompileInput, get_backend
from passdeploy.shipping.bundle import EngineSource, write_bundle
from passdeploy.shipping.hardware import this_machine
from passdeploy.shipping.runner import load
from passdeploy.shipping.verify import verify
from passdeploy.targets import DEVICES, Target, attached_device, attached_gpus
from tests.shipping.conftest import SHAPE, make_source

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not attached_gpus(), reason="no NVIDIA GPU is attached to this machine"),
]


def here() -> Target:
    """The attached GPU, whether the catalogue has it or not."""
    named = next((name for name, d in DEVICES.items() if d.compute_capability and attached_device(d)), "gpu")
    gpu = this_machine().gpus[0]
    return Target(named, gpu.name, gpu.compute_capability, "", "fp32", 1, 1, True)


@pytest.fixture(scope="module", params=["tensorrt_rtx", "tensorrt", "onnxruntime"])
def gpu_bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    target = replace(here(), backend=request.param, batch=4)
    backend = get_backend(request.param)
    if reason := backend.available(target) or backend.runnable(target):
        pytest.skip(f"{request.param}: {reason}")
    source = make_source(folder / "run", batch=4)
    backend.save(backend.compile(CompileInput(source.onnx), target), folder / "engine")
    engines = (EngineSource(folder / "engine", target, tolerance=1e-3),)
    return write_bundle(folder / "bundle", make_source(folder / "run", batch=4, engines=engines))


def test_torch_and_the_driver_name_the_same_gpus() -> None:
    import torch

    gpus = this_machine().gpus
    assert [gpu.name for gpu in gpus] == list(attached_gpus())
    assert gpus[0].compute_capability == "{}.{}".format(*torch.cuda.get_device_capability(0))


def test_verified_and_measured(gpu_bundle: Path) -> None:
    result = verify(gpu_bundle, measure=True)
    assert result.ok, result.reason
    assert result.latency_ms


@pytest.mark.parametrize("cuda_graphs", [True, False])
@pytest.mark.parametrize("streams", [1, 3])
def test_threads_get_their_own_answers(gpu_bundle: Path, streams: int, cuda_graphs: bool) -> None:
    images = np.random.default_rng(0).random((64, *SHAPE), dtype=np.float32)
    with load(gpu_bundle) as model:
        expected = model.run(images)
        options = {} if model.engine.backend == "onnxruntime" else {"streams": streams, "cuda_graphs": cuda_graphs}
    with load(gpu_bundle, **options) as model, ThreadPoolExecutor(6) as pool:
        starts = [4 * (i % 16) for i in range(200)]
        answers = list(pool.map(lambda at: model.run(images[at : at + 4]), starts))
    for at, answer in zip(starts, answers, strict=True):
        assert np.max(np.abs(answer - expected[at : at + 4])) <= 1e-3 * np.max(np.abs(expected))


@pytest.mark.parametrize("count", [3, 4, 9])
def test_images_that_lie_on_the_gpu(gpu_bundle: Path, count: int) -> None:
    import torch

    images = np.random.default_rng(1).random((count, *SHAPE), dtype=np.float32)
    with load(gpu_bundle) as model:
        if model.engine.backend == "onnxruntime":
            pytest.skip("takes host arrays")
        expected = model.run(images)
        answer = model.run(torch.from_numpy(images).cuda())
    assert np.max(np.abs(answer - expected)) <= 1e-3 * np.max(np.abs(expected))


def test_a_process_without_torch(gpu_bundle: Path) -> None:
    program = (
        "import sys; from passdeploy.shipping.runner import load; load(sys.argv[1]).close();"
        "print(sorted({'torch', 'pandas', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program, str(gpu_bundle)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "[]"
