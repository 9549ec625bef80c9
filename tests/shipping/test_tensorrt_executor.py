"""TensorRT's executor over an emulated CUDA run time: streams, CUDA graphs, arrays of the GPU, memory given back."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from passdeploy.errors import BadInput, PassdeployError
from passdeploy.shipping.contents import EngineInfo, open_bundle
from passdeploy.shipping.executors import base
from passdeploy.shipping.executors import tensorrt as executor
from passdeploy.shipping.executors.base import in_batches
from passdeploy.shipping.runner import Model
from passdeploy.shipping.sums import Refused
from tests.shipping.conftest import CLASSES, SHAPE
from tests.shipping.host_cuda import DeviceArray, HostCuda, HostEngine, tensorrt

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed: pip install 'passdeploy[cuda]'")
BATCH = 4


class Bench:
    """An emulated GPU with an engine on it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, info: EngineInfo) -> None:
        self.monkeypatch, self.info = monkeypatch, info
        self.install()

    def install(self, memory: int = 1 << 30, capturable: bool = True, version: str = "11.0.0", gpus: int = 1) -> None:
        import cuda.bindings

        self.cuda = HostCuda(memory, gpus)
        self.engine: HostEngine | None = HostEngine(self.cuda, SHAPE, len(CLASSES), BATCH, capturable)
        self.monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", self.cuda)
        self.monkeypatch.setattr(cuda.bindings, "runtime", self.cuda, raising=False)
        self.monkeypatch.setitem(sys.modules, "tensorrt", tensorrt(self.cuda, self.engine, version))

    def create(self, **options: Any) -> executor.TensorRtExecutor:
        return executor.create(self.info, b"plan", {}, **options)

    def expected(self, images: np.ndarray) -> np.ndarray:
        assert self.engine is not None
        return images.reshape(len(images), -1) @ self.engine.weights


@pytest.fixture
def bench(sealed_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    (info,) = open_bundle(sealed_bundle).engines
    requires = {"compute_capabilities": ["8.0"], "exact_version": True}
    made = Bench(
        monkeypatch, replace(info, backend="tensorrt", backend_version="11.0.0", batch=BATCH, requires=requires)
    )
    yield made
    assert not made.cuda.device and not made.cuda.pinned and not made.cuda.streams, "everything was given back"


Images = Callable[[int], np.ndarray]


@pytest.mark.parametrize("capturable", [True, False])
@pytest.mark.parametrize("cuda_graphs", [True, False])
@pytest.mark.parametrize("streams", [1, 3])
def test_threads_get_their_own_answers(
    bench: Bench, random_images: Images, streams: int, cuda_graphs: bool, capturable: bool
) -> None:
    bench.install(capturable=capturable)
    images = random_images(64)
    expected = bench.expected(images)
    made = bench.create(streams=streams, cuda_graphs=cuda_graphs)
    starts = [4 * (i % 16) for i in range(120)]
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda at: made.run(images[at : at + 4]), starts))
    for at, answer in zip(starts, answers, strict=True):
        np.testing.assert_allclose(answer, expected[at : at + 4], rtol=1e-5, atol=1e-5)
    graphed = cuda_graphs and capturable
    assert bench.cuda.graph_launches == (120 if graphed else 0)
    assert bench.cuda.launches == streams + (0 if graphed else 120), "one inference per stream before the capture"
    made.close()


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_every_thread_is_put_on_the_engines_gpu(
    bench: Bench, sealed_bundle: Path, random_images: Images, cuda_graphs: bool
) -> None:
    """Threads begin on the first GPU; and what else runs in one may put it on another between two calls."""
    bench.install(gpus=2)
    images = random_images(64)
    expected = bench.expected(images)
    made = bench.create(streams=3, cuda_graphs=cuda_graphs, device=1)
    assert {stream.gpu for stream in bench.cuda.streams.values()} == {1}
    on_gpu = DeviceArray(bench.cuda, images[:4])

    def answer(number: int) -> np.ndarray:
        bench.cuda.cudaSetDevice(number % 2)
        at = 4 * (number % 16)
        return made.run(images[at : at + 4])

    with ThreadPoolExecutor(6) as pool:
        for number, logits in enumerate(pool.map(answer, range(120))):
            at = 4 * (number % 16)
            np.testing.assert_allclose(logits, expected[at : at + 4], rtol=1e-5, atol=1e-5)
        model = Model(open_bundle(sealed_bundle), bench.info, made)
        logits = pool.submit(model.run, on_gpu).result()
        np.testing.assert_allclose(logits, expected[:4], rtol=1e-5, atol=1e-5)
    bench.cuda.cudaSetDevice(0)
    made.bind(images[:4])
    bench.cuda.cudaSetDevice(0)
    made.call()
    made.close()
    bench.cuda.cudaFree(on_gpu.address)


def test_without_a_number_the_current_gpu_is_left_alone(bench: Bench, random_images: Images) -> None:
    bench.install(gpus=2)
    bench.cuda.cudaSetDevice(1)
    made = bench.create()
    images = random_images(BATCH)
    np.testing.assert_allclose(made.run(images), bench.expected(images), rtol=1e-5, atol=1e-5)
    assert bench.cuda.here() == 1
    bench.cuda.cudaSetDevice(0)
    with pytest.raises(PassdeployError, match="cudaErrorInvalidResourceHandle"):
        made.run(images)
    made.close()


def test_a_gpu_that_is_not_there_is_refused(bench: Bench) -> None:
    with pytest.raises(Refused, match="cudaErrorInvalidDevice"):
        bench.create(device=1)


def test_a_call_is_the_inference_alone(bench: Bench, random_images: Images) -> None:
    """What is timed in scope `engine`: one launch of the graph, no transfer."""
    made = bench.create()
    images = random_images(BATCH)
    made.bind(images)
    copies: list[int] = []
    copy = bench.cuda.cudaMemcpyAsync
    bench.cuda.cudaMemcpyAsync = lambda *given: copies.append(1) or copy(*given)  # type: ignore[method-assign]
    before = bench.cuda.graph_launches
    made.call()
    assert (bench.cuda.graph_launches - before, copies) == (1, [])
    np.testing.assert_allclose(made.run(images), bench.expected(images), rtol=1e-5, atol=1e-5)
    assert len(copies) == 2
    made.close()


@pytest.mark.parametrize("count", [1, 4, 7])
@pytest.mark.parametrize("on_a_stream", [True, False])
def test_images_that_lie_on_the_gpu(
    bench: Bench, sealed_bundle: Path, random_images: Images, count: int, on_a_stream: bool
) -> None:
    images = random_images(count)
    _, stream = bench.cuda.cudaStreamCreateWithFlags(1)
    array = DeviceArray(bench.cuda, images, stream if on_a_stream else None)
    with Model(open_bundle(sealed_bundle), bench.info, bench.create(streams=2)) as model:
        np.testing.assert_allclose(model.run(array), bench.expected(images), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(model.run(images), bench.expected(images), rtol=1e-5, atol=1e-5)
    bench.cuda.cudaFree(array.address)
    bench.cuda.cudaStreamDestroy(stream)


def test_an_array_that_says_nothing_of_streams_is_waited_for(
    bench: Bench, sealed_bundle: Path, random_images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's arrays are of version 2: what its kernels on the default stream have not yet written is not there yet."""
    monkeypatch.setattr(DeviceArray, "version", 2)
    images = random_images(3)
    array = DeviceArray(bench.cuda, images, bench.cuda.legacy)
    with Model(open_bundle(sealed_bundle), bench.info, bench.create()) as model:
        np.testing.assert_allclose(model.run(array), bench.expected(images), rtol=1e-5, atol=1e-5)
    bench.cuda.cudaFree(array.address)


def test_wrong_arrays_of_the_gpu_are_named(bench: Bench, sealed_bundle: Path, random_images: Images) -> None:
    with Model(open_bundle(sealed_bundle), bench.info, bench.create()) as model:
        for values in (random_images(2)[:, :2], random_images(2).astype(np.float16), random_images(1)[0]):
            array = DeviceArray(bench.cuda, values)
            with pytest.raises(BadInput, match=r"images: .*expected f32 \[n, 3, 12, 10\]"):
                model.run(array)
            bench.cuda.cudaFree(array.address)


def test_a_cpu_bundle_wants_host_arrays(sealed_bundle: Path, random_images: Images) -> None:
    from passdeploy.shipping.runner import load

    with load(sealed_bundle) as model, pytest.raises(BadInput, match="this backend takes host arrays"):
        model.run(DeviceArray(HostCuda(), random_images(1)))


def test_a_gpu_that_fails_is_no_mistake_of_who_sent_the_images(bench: Bench, random_images: Images) -> None:
    """Servers answer the one with 400, the other with 500."""
    made = bench.create()
    images = random_images(BATCH)
    with bench.monkeypatch.context() as patch:
        patch.setattr(bench.cuda, "cudaMemcpyAsync", lambda *_: (400,))
        with pytest.raises(Refused, match="the inference failed: CUDA: cudaErrorInvalidResourceHandle"):
            made.run(images)
    np.testing.assert_allclose(made.run(images), bench.expected(images), rtol=1e-5, atol=1e-5)
    made.close()


def test_a_stream_too_many_gives_everything_back(bench: Bench) -> None:
    bench.install(memory=20_000)
    with pytest.raises(Refused, match="cudaErrorMemoryAllocation"):
        bench.create(streams=50)


def test_so_does_one_without_room_for_what_lies_between_its_layers(bench: Bench) -> None:
    assert bench.engine is not None
    bench.engine.contexts = 2
    with pytest.raises(Refused, match=r"engine \S+: the GPU has no room for the 3 MiB that the engine works in; take"):
        bench.create(streams=3)


def test_missing_cuda_bindings_are_said(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every engine of TensorRT needs them, and pip's tensorrt does not bring them along."""
    for name in ("cuda.bindings", "cuda.bindings.runtime"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(Refused) as error:
        base.create(bench.info, b"plan", {})
    assert str(error.value) == (
        f"engine {bench.info.id}: cuda.bindings is not installed; pip install tensorrt==11.0.0 cuda-bindings"
    )


def test_a_library_that_does_not_load_says_why(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def find(name: str, *_: object) -> None:
        if name == "tensorrt":
            raise ImportError("libnvinfer.so.11: cannot open shared object file", name="tensorrt.bindings")

    monkeypatch.delitem(sys.modules, "tensorrt")
    monkeypatch.setattr(sys, "meta_path", [SimpleNamespace(find_spec=find), *sys.meta_path])
    with pytest.raises(Refused, match=r"tensorrt.bindings cannot be imported \(libnvinfer.so.11: cannot .*\); pip"):
        base.create(bench.info, b"plan", {})


def test_another_batch_than_the_engines_is_refused(bench: Bench) -> None:
    bench.info = replace(bench.info, batch=2 * BATCH)
    with pytest.raises(Refused, match="does not take batches of 8"):
        bench.create()


def test_another_version_is_refused_before_the_engine_is_read(bench: Bench) -> None:
    bench.install(version="11.1.0")
    with pytest.raises(Refused, match=r"built by TensorRT 11\.0\.0, this machine has 11\.1\.0"):
        bench.create()


def test_what_tensorrt_does_not_take_is_refused(bench: Bench) -> None:
    bench.monkeypatch.setitem(sys.modules, "tensorrt", tensorrt(bench.cuda, None))
    with pytest.raises(Refused, match="does not fit this GPU"):
        bench.create()


def test_any_number_of_images(bench: Bench, random_images: Images) -> None:
    made, images = bench.create(), random_images(11)
    np.testing.assert_allclose(in_batches(made.run, images, BATCH), bench.expected(images), rtol=1e-5, atol=1e-5)
    made.close()
