"""Engines on an attached NVIDIA GPU: what runs there is what PyTorch computes, and it is timed by the GPU's clock."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from passdeploy.engines.base import CompileInput, get_backend
from passdeploy.engines.files import load_engine
from passdeploy.errors import BadInput
from passdeploy.targets import DEVICES, Target, attached_device, attached_gpus
from tests.engines.conftest import SIZE, Case, difference, make_case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not attached_gpus(), reason="no NVIDIA GPU is attached to this machine"),
]
BACKENDS = ("tensorrt_rtx", "tensorrt", "inductor", "torch_tensorrt", "onnxruntime", "onnxruntime_tensorrt")
BOUNDS = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 6e-2, "int8": 0.2}


@pytest.fixture(scope="module")
def here() -> Target:
    """The attached GPU, whether the catalogue has it or not."""
    major, minor = torch.cuda.get_device_capability()
    named = next((name for name, d in DEVICES.items() if d.compute_capability and attached_device(d)), "gpu")
    return Target(named, attached_gpus()[0], f"{major}.{minor}", "", "fp16", 1, 1, True)


@pytest.fixture(scope="module", params=[1, 4])
def gpu_case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, Case, CompileInput]:
    batch = request.param
    case = make_case(tmp_path_factory.mktemp("gpu"), batch)
    with torch.no_grad():
        program = torch.export.export(case.model, (torch.rand(batch, *SIZE),))
    return batch, case, replace(case.source, exported_program=program)


@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("name", BACKENDS)
def test_outputs_after_the_disk_and_timed_blocks(
    here: Target, gpu_case: tuple[int, Case, CompileInput], tmp_path: Path, name: str, precision: str
) -> None:
    batch, case, source = gpu_case
    backend, target = get_backend(name), replace(here, backend=name, precision=precision, batch=batch)
    if reason := backend.available(target) or backend.runnable(target):
        pytest.skip(f"{name}: {reason}")
    engine = load_engine(backend.save(backend.compile(source, target), tmp_path))
    with backend.runner(engine, target) as runner:
        logits = runner.run({"images": case.images})["logits"]
        assert difference(case.logits, logits) < BOUNDS[precision]
        runner.bind({"images": case.images[:batch]})
        runner.call()
        block = getattr(runner, "block", None)
        if block is not None:
            times = block(0.02, 5)
            assert len(times) >= 5 and min(times) > 0
        np.testing.assert_allclose(runner.run({"images": case.images})["logits"], logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["tensorrt_rtx", "tensorrt"])
def test_two_engines_take_turns_in_one_process(
    here: Target, gpu_case: tuple[int, Case, CompileInput], name: str
) -> None:
    batch, case, source = gpu_case
    backend, target = get_backend(name), replace(here, backend=name, batch=batch)
    if reason := backend.available(target) or backend.runnable(target):
        pytest.skip(f"{name}: {reason}")
    engine = backend.compile(source, target)
    with backend.runner(engine, target) as first, backend.runner(engine, target) as second:
        assert first._server is second._server  # type: ignore[attr-defined]
        for runner in (first, second):
            runner.bind({"images": case.images[:batch]})
        for _ in range(3):
            for runner in (first, second):
                assert runner.block(0.005, 3)  # type: ignore[attr-defined]
                assert min(runner.enqueued) > 0  # type: ignore[attr-defined]
                assert min(runner.end_to_end_block(0.005, 3)) > 0  # type: ignore[attr-defined]
        layers = first.layers()  # type: ignore[attr-defined]
        assert layers["Layers"]
        assert sum(first.layer_times().values()) > 0  # type: ignore[attr-defined]
    assert backend._server is None  # type: ignore[attr-defined]


def test_an_engine_of_another_gpu_is_refused(here: Target, gpu_case: tuple[int, Case, CompileInput]) -> None:
    batch, _, source = gpu_case
    backend = get_backend("tensorrt_rtx")
    other = "8.6" if here.compute_capability != "8.6" else "8.9"
    target = replace(here, backend="tensorrt_rtx", compute_capability=other, batch=batch)
    if reason := backend.available(target):
        pytest.skip(f"tensorrt_rtx: {reason}")
    engine = backend.compile(source, target)
    with pytest.raises(BadInput, match="compiled for compute capability"):
        backend.runner(engine, replace(here, backend="tensorrt_rtx", batch=batch))


def test_a_package_that_waits_for_the_gpu_is_timed_plainly(
    here: Target, gpu_case: tuple[int, Case, CompileInput]
) -> None:
    """It can't be captured; what trains in this process afterwards finds its stream and its random numbers."""
    batch, case, source = gpu_case
    backend, target = get_backend("inductor"), replace(here, backend="inductor", precision="fp32", batch=batch)
    if reason := backend.available(target) or backend.runnable(target):
        pytest.skip(f"inductor: {reason}")
    stream = torch.cuda.current_stream()
    with backend.runner(backend.compile(source, target), target) as runner:
        model = runner._model  # type: ignore[attr-defined]

        def waiting(*inputs: torch.Tensor) -> object:
            results = model(*inputs)
            torch.cuda.synchronize()
            return results

        runner._model = waiting  # type: ignore[attr-defined]
        runner.bind({"images": case.images[:batch]})
        assert runner._graph is None  # type: ignore[attr-defined]
        runner.call()
        assert min(runner.block(0.02, 5)) > 0  # type: ignore[attr-defined]
        assert difference(case.logits, runner.run({"images": case.images})["logits"]) < BOUNDS["fp32"]
        assert torch.cuda.current_stream() == stream and torch.rand(3, device="cuda").isfinite().all()
        runner._model = model  # type: ignore[attr-defined]
        runner.bind({"images": case.images[:batch]})
        assert runner._graph is not None, "and the next capture is none the worse"  # type: ignore[attr-defined]
        runner.call()
