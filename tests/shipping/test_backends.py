"""Bundles of the other backends: run where they can be, refused in one line where not."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest

from passdeploy.engines.base import CompileInput, get_backend
from passdeploy.errors import BadInput
from passdeploy.shipping.bundle import EngineSource, write_bundle
from passdeploy.shipping.contents import open_bundle
from passdeploy.shipping.executors import openvino as executor
from passdeploy.shipping.hardware import Gpu, Machine
from passdeploy.shipping.runner import load
from passdeploy.shipping.sums import Refused
from passdeploy.shipping.verify import verify
from passdeploy.targets import Target
from tests.shipping.conftest import SHAPE, cpu_target, make_source

A100 = Machine("x86_64", frozenset(), (Gpu("NVIDIA A100", "8.0"),), "13.0")


def bundle_of(folder: Path, target: Target) -> Path:
    """Compiles with the target's backend and ships that; skips when the backend is not here."""
    source = make_source(folder / "run", batch=target.batch)
    backend = get_backend(target.backend)
    reason = backend.available(target)
    if reason is not None:
        pytest.skip(reason)
    backend.save(backend.compile(CompileInput(source.onnx), target), folder / "engine")
    engines = (EngineSource(folder / "engine", target),)
    return write_bundle(folder / "bundle", make_source(folder / "run", batch=target.batch, engines=engines))


@pytest.fixture(scope="module")
def openvino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle_of(tmp_path_factory.mktemp("ov"), cpu_target(2).with_(backend="openvino"))


@pytest.fixture(scope="module")
def rtx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = Target("a100", "NVIDIA A100", "8.0", "tensorrt_rtx", "fp32", 1, 1, attached=False)
    return bundle_of(tmp_path_factory.mktemp("rtx"), target)


@pytest.mark.parametrize(("streams", "threads"), [(1, None), (2, None), (3, 2)])
def test_every_stream_of_openvino_has_the_threads_of_one(
    openvino: Path, monkeypatch: pytest.MonkeyPatch, streams: int, threads: int | None
) -> None:
    """OpenVINO takes no more streams than threads, and divides these among the streams."""
    core, asked = executor._core(), {}

    class Core:
        read_model = staticmethod(core.read_model)

        def compile_model(self, model: Any, device: str, settings: dict[str, Any]) -> Any:
            asked.update(settings)
            return core.compile_model(model, device, settings)

    monkeypatch.setattr(executor, "_core", Core)
    load(openvino, streams=streams, threads=threads).close()
    assert (asked["NUM_STREAMS"], asked["INFERENCE_NUM_THREADS"]) == (streams, streams * (threads or 1))


def test_openvino_from_threads(openvino: Path) -> None:
    images = np.random.default_rng(5).random((30, *SHAPE), dtype=np.float32)
    assert verify(openvino).ok
    with load(openvino, streams=2) as model, ThreadPoolExecutor(4) as pool:
        whole = model.run(images)
        parts = list(pool.map(lambda i: model.run(images[i : i + 3]), range(0, 30, 3)))
        assert np.array_equal(np.concatenate(parts), whole)
        model.bind(images[:2])
        model.call()


def test_no_stream_at_all_is_refused(openvino: Path) -> None:
    """Every call would wait for one for ever."""
    with pytest.raises(BadInput, match=r"^streams=0: must be a whole number, 1 or more$"):
        load(openvino, streams=0)


def test_openvino_without_torch(openvino: Path) -> None:
    program = (
        "import sys; from passdeploy.shipping.runner import load; load(sys.argv[1]).close();"
        "print(sorted({'torch', 'pandas', 'pydantic', 'onnx'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program, str(openvino)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "[]"


def test_rtx_engine_is_bound_to_its_gpu_and_version(rtx: Path) -> None:
    entry = open_bundle(rtx).manifest["engines"][0]
    assert entry["requires"]["compute_capabilities"] == ["8.0"]
    assert entry["requires"]["exact_version"]
    assert entry["latency_ms"] is None
    assert not entry["attached"]


def test_rtx_engine_without_its_gpu_is_refused(rtx: Path) -> None:
    result = verify(rtx, machine=Machine("x86_64", frozenset(), (), None))
    assert result.reason == (
        "engine a100-tensorrt-rtx-fp32-b1: it is for an NVIDIA GPU of compute capability 8.0, this machine has none; "
        "compile for this machine with passdeploy run --target"
    )
    assert verify(rtx, run=False).ok, "it can still be passed on"


def test_rtx_engine_on_a_machine_that_only_claims_a_gpu_is_one_line(rtx: Path) -> None:
    """The hardware fits by its word, and the library below finds no driver."""
    with pytest.raises(Refused) as error:
        load(rtx, machine=A100)
    assert "\n" not in str(error.value)
    assert "a100-tensorrt-rtx-fp32-b1" in str(error.value)


def test_a_missing_backend_says_what_to_install(sealed_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(Refused, match=r"onnxruntime is not installed; pip install onnxruntime==1\.[.\d]+$"):
        load(sealed_bundle)


def test_onnxruntime_on_a_gpu_is_the_session_that_was_measured_or_none(
    sealed_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The provider with its options; and where it can't start, no session on the CPU in its place."""
    import onnxruntime as ort

    from passdeploy.shipping.executors import onnxruntime as executor

    asked: list[object] = []
    starts = True

    class Session(ort.InferenceSession):  # type: ignore[misc]
        """Runs on the CPU, and says of itself what a machine with a GPU, or with a broken one, would."""

        def __init__(self, data: bytes, options: object, providers: list[object]) -> None:
            asked.append(providers)
            super().__init__(data, options, providers=["CPUExecutionProvider"])

        def get_providers(self) -> list[str]:
            return [*["CUDAExecutionProvider"][:starts], "CPUExecutionProvider"]

    monkeypatch.setattr(ort, "InferenceSession", Session)
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    contents = open_bundle(sealed_bundle)
    (made,) = contents.engines
    engine = replace(
        made, requires={"compute_capabilities": ["9.0"]}, meta={**made.meta, "providers": ["CUDAExecutionProvider"]}
    )
    given = engine, contents.sealed.read(engine.file), contents.manifest
    executor.create(*given).close()
    assert asked == [get_backend("onnxruntime").providers(cpu_target().with_(compute_capability="9.0"))]  # type: ignore[attr-defined]
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(Refused, match=r"no CUDAExecutionProvider; pip install onnxruntime-gpu==\S+ in place of"):
        executor.create(*given)
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    starts = False
    with pytest.raises(Refused, match="CUDAExecutionProvider could not start on this machine") as error:
        executor.create(*given)
    assert engine.id in str(error.value) and "\n" not in str(error.value)


def test_onnxruntime_on_another_gpu_than_the_first(sealed_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The session and what a measurement binds are on the GPU that was asked for."""
    import onnxruntime as ort

    from passdeploy.shipping.executors import onnxruntime as executor

    asked: list[Any] = []

    class Session(ort.InferenceSession):  # type: ignore[misc]
        def __init__(self, data: bytes, options: object, providers: list[object]) -> None:
            asked.extend(providers)
            super().__init__(data, options, providers=["CPUExecutionProvider"])

        def get_providers(self) -> list[str]:
            return ["CUDAExecutionProvider"]

        def io_binding(self) -> Any:
            binding = MagicMock()
            binding.bind_output.side_effect = lambda name, *place: asked.append(place)
            return binding

        def run_with_iobinding(self, binding: Any) -> None: ...

    value = MagicMock()
    value.ortvalue_from_numpy.side_effect = lambda array, *place: asked.append(place)
    monkeypatch.setattr(ort, "InferenceSession", Session)
    monkeypatch.setattr(ort, "OrtValue", value)
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    contents = open_bundle(sealed_bundle)
    (made,) = contents.engines
    data = contents.sealed.read(made.file)
    engine = replace(made, requires={"compute_capabilities": ["9.0"]})
    loaded = executor.create(engine, data, contents.manifest, device=1)
    loaded.bind(contents.samples()[0][:1])
    assert asked == [("CUDAExecutionProvider", {"use_tf32": "0", "device_id": "1"}), ("cuda", 1), ("cuda", 1)]
    with pytest.raises(BadInput, match=r"device=: engine .* runs on a CPU"):
        executor.create(made, data, contents.manifest, device=1)


def test_another_backend_goes_through_its_own_runner(tmp_path: Path) -> None:
    """AOTInductor's package needs torch: the engines' runner is taken, the bundle's checks stay the same."""
    from passdeploy.shipping.executors import engines

    bundle = write_bundle(tmp_path / "bundle", make_source(tmp_path / "run", batch=2))
    contents = open_bundle(bundle)
    (engine,) = contents.engines
    executor = engines.create(engine, contents.sealed.read(engine.file), contents.manifest)
    images, expected = contents.samples()
    try:
        assert np.max(np.abs(executor.run(images[:2]) - expected[:2])) <= 1e-5 * np.max(np.abs(expected))
    finally:
        executor.close()
