from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from passdeploy.engines._trt import TrtBackend
from passdeploy.engines.base import CompileInput, backends, first_available, get_backend, require
from passdeploy.engines.files import load_engine
from passdeploy.errors import BadInput, Unavailable
from passdeploy.targets import Target, resolve
from tests.engines.conftest import A100, CPU, Case, difference

NAMES = ("onnxruntime", "openvino")


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_pytorchs_before_and_after_the_disk(case: Case, tmp_path: Path, name: str) -> None:
    backend = get_backend(name)
    engine = backend.compile(case.source, CPU)
    loaded = load_engine(backend.save(engine, tmp_path))
    assert loaded == engine
    with backend.runner(loaded, CPU) as runner:
        logits = runner.run({"images": case.images})["logits"]
    assert difference(case.logits, logits) <= 1e-5


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_batch_engine_takes_any_number_of_images(case4: Case, name: str, precision: str) -> None:
    backend, target = get_backend(name), replace(CPU, batch=4, precision=precision)
    with backend.runner(backend.compile(case4.source, target), target) as runner:
        whole = runner.run({"images": case4.images})["logits"]
        for count in (1, 3, 4, 5):
            part = runner.run({"images": case4.images[:count]})["logits"]
            assert part.shape == (count, 5)
            np.testing.assert_allclose(part, whole[:count], atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_bound_calls_compute_on_the_bound_images(case: Case, name: str) -> None:
    backend = get_backend(name)
    with backend.runner(backend.compile(case.source, CPU), CPU) as runner:
        first = case.images[:1].copy()
        runner.bind({"images": first})
        first[:] = 0  # the caller's array is the caller's
        runner.call()
        runner.call()
        assert difference(case.logits[:1], bound_output(runner)) <= 1e-5
        with pytest.raises(BadInput, match="bind takes exactly 1 image"):
            runner.bind({"images": case.images[:2]})


@pytest.mark.parametrize("name", NAMES)
def test_ctrl_c_behind_two_runners_is_no_crash(case: Case, tmp_path: Path, name: str) -> None:
    """Two runners, gone in the order in which they came."""
    get_backend(name).save(get_backend(name).compile(case.source, CPU), tmp_path)
    program = f"""
import os, signal, time
from pathlib import Path
from passdeploy.engines.base import get_backend
from passdeploy.engines.files import load_engine
from passdeploy.targets import resolve
backend, engine, target = get_backend("{name}"), load_engine(Path("{tmp_path}")), resolve("cpu")
first, second = backend.runner(engine, target), backend.runner(engine, target)
first.close()
del first
second.close()
del second
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(10)
except KeyboardInterrupt:
    print("interrupted")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr


def bound_output(runner: object) -> np.ndarray:
    """What the last `call` left in its output buffer."""
    if hasattr(runner, "_binding"):
        return runner._binding.copy_outputs_to_cpu()[0]
    return np.array(runner._request.get_output_tensor().data)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", NAMES)
def test_int8_is_quantised_and_close(case: Case, name: str) -> None:
    import onnx

    backend, target = get_backend(name), replace(CPU, precision="int8")
    engine = backend.compile(case.source, target)
    kinds = [node.op_type for node in onnx.load_model_from_string(engine.data).graph.node]
    assert kinds.count("QuantizeLinear") >= 4
    with backend.runner(engine, target) as runner:
        logits = runner.run({"images": case.images})["logits"]
    assert 0 < difference(case.logits, logits) < 0.15


@pytest.mark.parametrize("name", [*NAMES, "inductor"])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_on_a_cpu_is_refused(name: str, precision: str) -> None:
    with pytest.raises(Unavailable) as error:
        require(get_backend(name), replace(CPU, precision=precision))
    assert precision in str(error.value) and "--precision fp32" in str(error.value)
    with pytest.raises((Unavailable, BadInput)):
        resolve("cpu", backend=name, precision=precision)


def test_threads_that_the_machine_lacks() -> None:
    for threads in (0, -1, 4096):
        with pytest.raises(Unavailable, match=f"--threads {threads}: this machine lets a process use 1 to"):
            require(get_backend("onnxruntime"), replace(CPU, threads=threads))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"threads": 2}, "--threads 2"),
        ({"batch": 8}, "--batch 8"),
        ({"precision": "int8"}, "--precision int8"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_an_engine_for_other_settings_is_refused(case: Case, name: str, change: dict[str, object], said: str) -> None:
    backend = get_backend(name)
    engine = backend.compile(case.source, CPU)
    with pytest.raises(BadInput, match=said):
        backend.runner(engine, CPU.with_(**change))


@pytest.mark.parametrize("name", NAMES)
def test_damage_behind_a_good_digest_is_one_line(case: Case, name: str) -> None:
    backend = get_backend(name)
    engine = backend.compile(case.source, CPU)
    with pytest.raises(BadInput) as error:
        backend.runner(replace(engine, data=engine.data[: len(engine.data) // 2]), CPU)
    assert "\n" not in str(error.value) and name in str(error.value)


def test_wrong_inputs_are_named(case: Case) -> None:
    backend = get_backend("onnxruntime")
    with backend.runner(backend.compile(case.source, CPU), CPU) as runner:
        for inputs, said in (
            ({"image": case.images}, "expects inputs"),
            ({"images": case.images.astype(np.float64)}, "float32"),
            ({"images": case.images[:, :2]}, "shape"),
            ({"images": case.images[0]}, "shape"),
            ({"images": case.images[:0]}, "shape"),
        ):
            with pytest.raises(BadInput, match=said):
                runner.run(inputs)


def test_the_graph_must_fit_the_batch(case: Case) -> None:
    with pytest.raises(BadInput, match="exported for batch 1, the target asks for 4"):
        get_backend("onnxruntime").compile(case.source, replace(CPU, batch=4))


@pytest.mark.parametrize("content", [b"", b"not an onnx file", None])
def test_a_file_that_is_no_onnx(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    for name in NAMES:
        with pytest.raises(BadInput) as error:
            get_backend(name).compile(CompileInput(path), CPU)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_external_weights_become_part_of_the_engine(case: Case, tmp_path: Path) -> None:
    import onnx

    model = onnx.load(case.onnx)
    onnx.save(model, tmp_path / "model.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert (tmp_path / "weights.bin").exists()
    backend = get_backend("onnxruntime")
    engine = backend.compile(CompileInput(tmp_path / "model.onnx"), CPU)
    (tmp_path / "weights.bin").unlink()
    with backend.runner(engine, CPU) as runner:
        assert difference(case.logits, runner.run({"images": case.images})["logits"]) <= 1e-5


def test_every_backend_registers_and_says_why_it_cannot() -> None:
    known = backends()
    assert {"onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", "inductor", "torch_tensorrt"} <= set(known)
    h100 = Target("h100", "NVIDIA H100", "9.0", "tensorrt", "fp16", 1, 1, False)
    for name, backend in known.items():
        reason = backend.runnable(h100)
        assert reason and "\n" not in reason, name
        assert backend.version()


def test_unknown_backend_names_the_nearest() -> None:
    with pytest.raises(BadInput, match=r"--backend onnx-runtime: no such backend; did you mean onnxruntime"):
        get_backend("onnx-runtime")
    with pytest.raises(BadInput, match="did you mean tensorrt"):
        resolve("a100", backend="tensorrt-rtx")


def test_where_the_target_is_attached_a_backend_that_runs_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver too old for one runtime may do for the next: nothing could be measured with the one that only builds."""
    monkeypatch.setattr(get_backend("openvino"), "runnable", lambda _: "its driver is too old")
    assert first_available(("openvino", "onnxruntime"), CPU).name == "onnxruntime"
    assert first_available(("openvino", "onnxruntime"), CPU.with_(attached=False)).name == "openvino"
    assert first_available(("openvino",), CPU).name == "openvino"


def test_a_backend_whose_makers_do_not_name_the_gpu_comes_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(get_backend("openvino"), "unproven", lambda _: True)
    assert first_available(("openvino", "onnxruntime"), CPU).name == "onnxruntime"
    assert first_available(("openvino",), CPU).name == "openvino"
    h100 = resolve("a100", backend="tensorrt_rtx").with_(compute_capability="9.0", attached=True)
    assert get_backend("tensorrt_rtx").unproven(h100) and not get_backend("tensorrt").unproven(h100)


def test_single_means_single_wherever_onnxruntime_runs_on_a_gpu() -> None:
    """What TensorRT leaves to CUDA, too."""
    for name in ("onnxruntime", "onnxruntime_tensorrt"):
        chosen = get_backend(name).providers(A100)  # type: ignore[attr-defined]
        assert chosen[-1] == ("CUDAExecutionProvider", {"use_tf32": "0"})


def test_tensorrt_builds_without_a_timing_cache_where_it_cannot_have_one(
    case: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    caches: list[str] = []
    monkeypatch.setattr(TrtBackend, "compile", lambda *given: caches.append(given[-1].timing_cache))
    (tmp_path / "file").touch()
    for root in (tmp_path / "file", tmp_path):
        monkeypatch.setenv("XDG_CACHE_HOME", str(root))
        get_backend("tensorrt").compile(case.source, A100)
    assert caches[0] == ""
    assert Path(caches[1]).parent == tmp_path / "passdeploy"


def test_the_first_available_backend_is_taken_else_all_reasons_told() -> None:
    assert first_available(("tensorrt", "openvino", "onnxruntime"), CPU).name == "openvino"
    with pytest.raises(Unavailable) as error:
        first_available(("tensorrt", "torch_tensorrt"), CPU)
    assert "tensorrt: " in str(error.value) and "torch_tensorrt: " in str(error.value)


def test_listing_backends_imports_no_heavy_library() -> None:
    heavy = ("torch", "onnx", "onnxruntime", "openvino", "tensorrt_rtx", "polygraphy")
    program = (
        "import sys; from passdeploy.engines.base import backends; assert len(backends()) >= 6; "
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_tensorrt_inside_onnxruntime_offers_no_single_precision() -> None:
    """It would be TF32, which the provider has no option against."""
    assert "fp32" not in get_backend("onnxruntime_tensorrt").precisions
    assert "fp32" in get_backend("onnxruntime").precisions


def test_a_provider_that_is_compiled_in_but_does_not_start_can_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wheels are linked with one TensorRT major; beside another one ONNX Runtime goes on without the provider."""
    import onnxruntime as ort

    from passdeploy.engines import onnxruntime as module

    starts: list[str] = ["CUDAExecutionProvider"]
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["TensorrtExecutionProvider", "CUDAExecutionProvider"])
    monkeypatch.setattr(
        ort,
        "InferenceSession",
        lambda *_, **__: SimpleNamespace(get_providers=lambda: [*starts, "CPUExecutionProvider"]),
    )
    monkeypatch.setattr(module, "_preload", lambda: None)
    module._starts.cache_clear()
    target = A100.with_(attached=True)
    backend = get_backend("onnxruntime_tensorrt")
    assert backend.available(target) is None, "the engine is a graph, whatever runs it"
    assert "TensorrtExecutionProvider does not start here" in (backend.runnable(target) or "")
    assert get_backend("onnxruntime").runnable(target) is None
    starts.insert(0, "TensorrtExecutionProvider")
    module._starts.cache_clear()
    assert backend.runnable(target) is None
    module._starts.cache_clear()


def test_whether_a_provider_starts_is_found_out_without_onnx(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bundle is served with numpy and ONNX Runtime alone."""
    from passdeploy.engines import onnxruntime as module

    monkeypatch.setitem(sys.modules, "onnx", None)
    module._starts.cache_clear()
    assert module._starts("CPUExecutionProvider")
    loaded = module.session(module._SMALLEST, 1, ["CPUExecutionProvider"], {})
    assert loaded.run(None, {"x": np.array([-1.0], np.float32)})[0].tolist() == [0.0]
    module._starts.cache_clear()


def test_libraries_of_wheels_are_loaded_for_gpus_alone(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process without torch nothing else would: the provider would not start."""
    import onnxruntime as ort

    from passdeploy.engines import onnxruntime as module

    asked: list[str] = []
    monkeypatch.setattr(ort, "preload_dlls", lambda: asked.append("cuda"), raising=False)
    module._preload.cache_clear()
    data = case.source.onnx.read_bytes()
    module.session(data, 1, ["CPUExecutionProvider"], {})
    assert not asked
    for _ in range(2):
        with pytest.raises(BadInput, match=r"CUDAExecutionProvider could not start|cannot be loaded"):
            module.session(data, 1, [module.CUDA], {})
    assert asked == ["cuda"]
    module._preload.cache_clear()
