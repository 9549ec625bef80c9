"""The contexts in which TensorRT-RTX's engines run, over an emulated CUDA run time, and what its real module offers."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import pytest

from passdeploy.engines import _common, _trt, _trt_child
from passdeploy.engines._cuda import Stream
from passdeploy.engines._trt import TrtRunner
from passdeploy.errors import BadInput
from passdeploy.shipping.contents import open_bundle
from passdeploy.shipping.executors import tensorrt as executor
from tests.shipping.conftest import CLASSES, SHAPE, make_source
from tests.shipping.host_cuda import Context, HostCuda, HostEngine, tensorrt
from tests.shipping.host_cuda import Stream as HostStream

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed: pip install 'passdeploy[cuda]'")
BATCH = 4


class Served:
    """A `Server` whose child is this process."""

    who = "TensorRT"

    def __init__(self) -> None:
        self.verbs = _trt_child._verbs()

    def ask(self, verb: str, *arguments: object) -> Any:
        return self.verbs[verb](*arguments)


@pytest.fixture(params=[True, False], ids=["rtx", "full"])
def emulated(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[bool, HostEngine]:
    """Whether TensorRT-RTX is emulated, and the engine that its module or TensorRT's gives out."""
    import cuda.bindings

    runtime = HostCuda()
    engine = HostEngine(runtime, SHAPE, len(CLASSES), BATCH, capturable=True)
    module = tensorrt(runtime, engine, rtx=request.param)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", runtime)
    monkeypatch.setattr(cuda.bindings, "runtime", runtime, raising=False)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx" if request.param else "tensorrt", module)
    monkeypatch.setattr(_trt_child, "_library", lambda: module)
    return request.param, engine


def test_what_is_measured_runs_no_fallback_kernels(emulated: tuple[bool, HostEngine]) -> None:
    """Neither the context that is captured nor the one whose layers are timed."""
    rtx, engine = emulated
    loaded = _trt_child._Loaded(b"plan", BATCH)
    images = np.random.default_rng(0).random((BATCH, *SHAPE), dtype=np.float32)
    assert loaded.bind({"images": images})
    expected = images.reshape(BATCH, -1) @ engine.weights
    np.testing.assert_allclose(loaded.run({"images": images})["logits"], expected, rtol=1e-5, atol=1e-5)
    loaded.layer_times(2)
    loaded.close()
    assert engine.strategies == (["eager", "eager"] if rtx else [None, None])


def test_an_engine_that_does_not_fit_leaves_nothing_on_the_gpu(emulated: tuple[bool, HostEngine]) -> None:
    """Its process goes on, with the engine that it was to be compared with."""
    _, engine = emulated
    cuda = engine.cuda
    first = _trt_child._Loaded(b"plan", BATCH)
    held = dict(cuda.device), dict(cuda.streams)
    cuda.left = BATCH * int(np.prod(SHAPE)) * 4  # the images, and not the logits
    with pytest.raises(BadInput, match="MemoryAllocation; take a smaller --batch"):
        _trt_child._Loaded(b"plan", BATCH)
    engine.contexts = 2
    with pytest.raises(BadInput, match="the GPU has no room for the 3 MiB that the engine works in"):
        _trt_child._Loaded(b"plan", BATCH)
    assert (cuda.device, cuda.streams) == held
    first.close()


def test_nor_does_what_is_served(emulated: tuple[bool, HostEngine], tmp_path: Path) -> None:
    from passdeploy.shipping.bundle import write_bundle

    rtx, engine = emulated
    (made,) = open_bundle(write_bundle(tmp_path / "bundle", make_source(tmp_path / "run"))).engines
    requires = {"compute_capabilities": ["8.0"], "exact_version": True}
    name = "tensorrt_rtx" if rtx else "tensorrt"
    info = replace(made, backend=name, backend_version="11.0.0", batch=BATCH, requires=requires)
    executor.create(info, b"plan", {}, streams=2).close()
    assert engine.strategies == (["eager", "eager"] if rtx else [None, None])


def test_the_first_call_of_a_block_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """It finds cold caches, as everywhere."""
    launches, clock = [], [0.0]
    monkeypatch.setattr(_trt_child.time, "perf_counter", lambda: clock[0])
    loaded = object.__new__(_trt_child._Loaded)
    loaded.inputs, loaded.outputs, loaded._bound = {}, {}, {}

    def launch() -> None:
        launches.append(0.05 if not launches else 0.0)
        clock[0] += launches[-1]

    def timed(enqueue: Callable[[], None]) -> tuple[float, float]:
        enqueue()
        return launches[-1], 0.0

    loaded._launch = launch
    loaded.stream = SimpleNamespace(handle=0, synchronise=lambda: None, timed=timed)  # type: ignore[assignment]
    assert loaded.block(0, 3) == [(0.0, 0.0)] * 3
    launches.clear()
    taken = loaded.end_to_end_block(0, 3)
    assert taken == [0.0] * 3
    launches.clear()
    loaded.call()
    assert len(launches) == 1, "one inference is one"


def test_a_capture_that_fails_leaves_nothing_behind(
    emulated: tuple[bool, HostEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No error that the next launch would be blamed for, and no graph."""
    runtime = sys.modules["cuda.bindings.runtime"]
    destroyed: list[object] = []

    def destroy(graph: object) -> tuple[int]:
        destroyed.append(graph)
        return (0,)

    def refused() -> None:
        runtime.last_error = 1  # type: ignore[attr-defined]
        raise BadInput("refused")

    monkeypatch.setattr(runtime, "cudaGraphDestroy", destroy)
    stream = Stream()
    with pytest.raises(BadInput, match="refused"):
        stream.capture(refused)
    assert len(destroyed) == 1 and runtime.last_error == 0 and stream.handle.captured is None  # type: ignore[attr-defined]
    with monkeypatch.context() as patch, pytest.raises(BadInput, match="MemoryAllocation; take a smaller --batch"):
        patch.setattr(runtime, "cudaGraphInstantiate", lambda *_: (2, None))
        stream.capture(lambda: None)
    assert len(destroyed) == 2
    with monkeypatch.context() as patch, pytest.raises(BadInput, match="cudaErrorInvalidValue"):
        patch.setattr(runtime, "cudaStreamEndCapture", lambda _: (1, None))
        stream.capture(lambda: None)
    assert len(destroyed) == 2, "there was none"
    stream.free()


def test_an_engine_that_no_graph_can_hold_is_enqueued_and_says_so(
    emulated: tuple[bool, HostEngine], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A capture that breaks off, and what TensorRT-RTX knows beforehand; numbers are right either way."""
    _, engine = emulated
    monkeypatch.setattr(_common, "_said", set())

    def broken_off(stream: HostStream) -> tuple[int, None]:
        stream.captured = None
        return 1, None

    monkeypatch.setattr(sys.modules["cuda.bindings.runtime"], "cudaStreamEndCapture", broken_off)
    images = {"images": np.random.default_rng(0).random((BATCH, *SHAPE), dtype=np.float32)}
    expected = images["images"].reshape(BATCH, -1) @ engine.weights
    for engine.capturable in (True, False):
        server = Served()
        runner = TrtRunner(server, lambda: None, b"plan", {"images": [-1, *SHAPE]}, BATCH)  # type: ignore[arg-type]
        runner.bind(images)
        runner.call()
        assert not runner.graphed
        np.testing.assert_allclose(runner.run(images)["logits"], expected, rtol=1e-5, atol=1e-5)
        runner.close()
    told = [record.getMessage() for record in caplog.records]
    assert "kernel by kernel" in told[0] and told[0].endswith("CUDA: cudaErrorInvalidValue")
    assert [line.endswith("says that it allocates as it runs") for line in told[1:]] == [True]


def test_an_attempt_to_capture_that_breaks_the_gpu_is_one_line(
    emulated: tuple[bool, HostEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not what the first timed block stumbles over."""
    runtime = sys.modules["cuda.bindings.runtime"]
    loaded = _trt_child._Loaded(b"plan", BATCH)

    def broken(stream: HostStream) -> tuple[int, None]:
        stream.captured = None
        monkeypatch.setattr(runtime, "cudaStreamSynchronize", lambda _: (400,))
        return 1, None

    monkeypatch.setattr(runtime, "cudaStreamEndCapture", broken)
    with pytest.raises(BadInput, match="cudaErrorInvalidResourceHandle"):
        loaded.bind({"images": np.zeros((BATCH, *SHAPE), np.float32)})


def test_an_output_as_large_as_the_data_make_it_is_refused(
    emulated: tuple[bool, HostEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of non-maximum suppression: one byte was taken for it, and the engine wrote past that."""
    _, engine = emulated
    held = dict(engine.cuda.device)
    monkeypatch.setattr(Context, "get_tensor_shape", lambda self, name: (-1, 6))
    with pytest.raises(BadInput, match=r"a tensor of shape \[-1, 6\] is as large as the data make it"):
        _trt_child._Loaded(b"plan", BATCH)
    assert engine.cuda.device == held


def test_a_full_disk_leaves_no_server_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    released: list[bool] = []

    def full(**_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(_trt.tempfile, "NamedTemporaryFile", full)
    with pytest.raises(OSError, match="No space left"):
        TrtRunner(Served(), lambda: released.append(True), b"plan", {}, BATCH)  # type: ignore[arg-type]
    assert released == [True]


def test_the_real_module_offers_what_is_set() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'passdeploy[rtx]'")
    assert "EAGER" in trt.DynamicShapesKernelSpecializationStrategy.__members__
    assert isinstance(trt.IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy, property)
    assert "IRuntimeConfig" in trt.ICudaEngine.create_runtime_config.__doc__
    assert "runtime_config" in trt.ICudaEngine.create_execution_context.__doc__
    assert isinstance(trt.ICudaEngine.device_memory_size_v2, property)
