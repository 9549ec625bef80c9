from __future__ import annotations

import io
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from passdeploy.engines import _common
from passdeploy.engines._aoti import CudaAotiRunner, cpu_flags, drop_copies, prepare
from passdeploy.engines.base import CompileInput, Engine, get_backend
from passdeploy.engines.files import load_engine
from passdeploy.errors import BadInput
from passdeploy.tf32 import single_means_single
from tests.engines.conftest import CPU, SIZE, Case, difference

INDUCTOR = get_backend("inductor")
AOTI = replace(CPU, backend="inductor")
pytestmark = pytest.mark.skipif(INDUCTOR.available(AOTI) is not None, reason=f"inductor: {INDUCTOR.available(AOTI)}")


@pytest.fixture(scope="module")
def source(case: Case) -> CompileInput:
    with torch.no_grad():
        program = torch.export.export(case.model, (torch.rand(1, *SIZE),))
    return replace(case.source, exported_program=program)


@pytest.fixture(scope="module")
def built(source: CompileInput) -> Engine:
    return INDUCTOR.compile(source, AOTI)


def test_outputs_are_pytorchs_after_the_disk_and_threads_are_put_back(
    case: Case, built: Engine, tmp_path: Path
) -> None:
    path = INDUCTOR.save(built, tmp_path)
    before = torch.get_num_threads()
    with INDUCTOR.runner(load_engine(path), AOTI) as runner:
        assert torch.get_num_threads() == 1
        logits = runner.run({"images": case.images})["logits"]
        runner.bind({"images": case.images[:1]})
        runner.call()
        with pytest.raises(BadInput, match="one number of threads per process"):
            INDUCTOR.runner(replace(built, meta={**built.meta, "threads": 2}), replace(AOTI, threads=2))
        second = INDUCTOR.runner(built, AOTI)
    assert torch.get_num_threads() == 1, "one is still open"
    second.close()
    assert difference(case.logits, logits) <= 1e-5
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("meta", "said"),
    [
        ({"version": "2.0.0"}, "made by PyTorch 2.0.0"),
        ({"cpu_flags": ["avx512_of_tomorrow"]}, "uses avx512_of_tomorrow, which this CPU lacks"),
    ],
)
def test_a_package_for_another_machine_is_refused_before_it_is_loaded(
    built: Engine, meta: dict[str, object], said: str
) -> None:
    with pytest.raises(BadInput, match=said) as error:
        INDUCTOR.runner(replace(built, data=b"never loaded", meta={**built.meta, **meta}), AOTI)
    assert "compile it again here" in str(error.value)


def test_a_package_that_is_none_is_one_line(built: Engine) -> None:
    with pytest.raises(BadInput, match="cannot be loaded") as error:
        INDUCTOR.runner(replace(built, data=b"PK nothing"), AOTI)
    assert "\n" not in str(error.value)


def test_without_an_exported_program_it_says_so(case: Case) -> None:
    with pytest.raises(BadInput, match=r"compiles from torch\.export"):
        INDUCTOR.compile(case.source, AOTI)


def test_a_build_leaves_no_second_copy_of_the_weights(built: Engine) -> None:
    """Packages are loaded from their own bytes: the other tests ran this one."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    with zipfile.ZipFile(io.BytesIO(built.data)) as archive:
        libraries = [Path(name).name for name in archive.namelist() if name.endswith(".wrapper.so")]
    assert len(libraries) == 1
    assert not list(Path(cache_dir()).rglob(libraries[0]))


def test_only_what_was_packed_is_removed_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, package = tmp_path / "cache", tmp_path / "model.pt2"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache))
    files = ["ab/cabx.wrapper.so", "ab/cabx.wrapper.cpp", "cd/ccdx.wrapper.so", "ef/other.so", "gh/cghx.wrapper.so"]
    files.append("tmp1/ab/cabx.wrapper.so")  # of a build without a cache
    for name in files:
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / name).write_text("weights")
    with zipfile.ZipFile(package, "w") as archive:
        for name in files:
            if name not in ("cd/ccdx.wrapper.so", files[-1]):
                archive.write(cache / name, f"model/data/aotinductor/model/{Path(name).name}")
    later = package.stat().st_mtime_ns + 1_000_000
    os.utime(cache / "gh/cghx.wrapper.so", ns=(later, later))  # linked again by a process that has yet to pack it
    drop_copies(package)
    assert [name for name in files if not (cache / name).exists()] == [files[0], files[-1]]
    package.write_bytes(b"no archive")
    drop_copies(package)


def test_half_precision_programs_keep_float32_at_the_border(case: Case, source: CompileInput) -> None:
    """What is compiled for a GPU, run here by PyTorch itself."""
    for precision, bound in (("fp16", 5e-3), ("bf16", 5e-2)):
        program = prepare(source, precision, "cpu")
        with torch.no_grad():
            logits = program.module()(torch.from_numpy(case.images[:1]))
        assert logits.dtype == torch.float32
        assert 0 < difference(case.logits[:1], logits.numpy()) < bound


class Casting(torch.nn.Module):
    """A user's network that casts: its convolution, a mask that it makes itself, and back to its input's type."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = torch.nn.Conv2d(3, 8, 3), torch.nn.Linear(8, 5)
        self.register_buffer("kept", torch.tensor([1, 1, 0, 1, 1, 0, 1, 1]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x).float() * self.kept.to(torch.float32)[:, None, None]
        pooled = torch.relu(y).to(x.dtype).mean((2, 3))
        return self.head(torch.softmax(pooled, 1, dtype=torch.float32))


def masked(network: torch.nn.Module, images: torch.Tensor) -> torch.nn.Module:
    """Under half of its masks, with the kernel's operator, as `compile --masked` has it."""
    from passdeploy.groups import find_groups
    from passdeploy.groups.check import random_structure
    from passdeploy.kernels.masked_forward import masked_network

    groups = find_groups(network, images[:1])
    return masked_network(network, groups, random_structure(groups, 2))


@pytest.mark.parametrize("kind", ["casting", "masked"])
@pytest.mark.parametrize(("precision", "bound"), [("fp16", 5e-3), ("bf16", 5e-2)])
def test_a_network_that_casts_is_prepared_in_half_precision(kind: str, precision: str, bound: float) -> None:
    """The export asserts the type before every `.to`, and writes float32 down where it means the network's type."""
    from tests.scripted import tiny_resnet

    torch.manual_seed(0)
    images = torch.rand(2, 3, 16, 12)
    network = Casting().eval() if kind == "casting" else masked(tiny_resnet().eval(), images)
    with torch.no_grad():
        exported = torch.export.export(network, (images,))
        expected = network(images).numpy()
        asserted = [node for node in exported.graph.nodes if "_assert_tensor_metadata" in str(node.target)]
        assert asserted, "nothing is tested where the export asserts nothing"
        program = prepare(CompileInput(Path("none"), exported), precision, "cpu")
        logits = program.module()(images)
    assert logits.dtype == torch.float32
    assert 0 < difference(expected, logits.numpy()) < bound
    assert asserted[0] in exported.graph.nodes, "the program is left as it is"


@pytest.mark.parametrize("kind", ["casting", "masked"])
def test_no_assertion_is_left_that_names_a_device(kind: str) -> None:
    """On a GPU they would compare "cuda" with "cuda:0", and fail; `meta` stands in for one, and would let them pass."""
    from tests.scripted import tiny_resnet

    images = torch.rand(2, 3, 16, 12)
    network = Casting().eval() if kind == "casting" else masked(tiny_resnet().eval(), images)
    with torch.no_grad():
        exported = torch.export.export(network, (images,))
        program = prepare(CompileInput(Path("none"), exported), "fp32", "meta")
        logits = program.module()(images.to("meta"))
    assert not [node for node in program.graph.nodes if "_assert_tensor_metadata" in str(node.target)]
    assert logits.device.type == "meta"


def test_a_gpus_package_may_do_without_frozen_weights(source: CompileInput, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU's compiler is asked for; a stand-in for it fails as told."""
    from passdeploy.engines import _aoti

    asked: list[bool] = []
    fails: list[bool] = [True]

    def compiler(program: object, package_path: str, inductor_configs: dict[str, object]) -> None:
        asked.append(bool(inductor_configs["freezing"]))
        if fails == [True, False] or inductor_configs["freezing"] in fails:
            raise RuntimeError("no such kernel\nand more")
        Path(package_path).write_bytes(b"package")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compiler)
    monkeypatch.setattr(_aoti, "prepare", lambda *_: None)
    gpu = replace(AOTI, compute_capability="9.0", precision="fp16")
    engine = INDUCTOR.compile(source, gpu)
    assert asked == [True, False] and engine.data == b"package"
    assert engine.meta["settings"]["freezing"] is False and engine.meta["settings"]["max_autotune"] is False
    fails.append(False)
    with pytest.raises(BadInput, match=r"does not compile: no such kernel and more$"):
        INDUCTOR.compile(source, gpu)
    with pytest.raises(BadInput, match="does not compile"):
        INDUCTOR.compile(source, AOTI)
    assert asked == [True, False, True, False, True], "a CPU's compiler is asked once"


def test_what_the_cpp_compiler_said_is_what_is_told(source: CompileInput, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor's own message begins with the whole command line."""
    from torch._inductor.exc import CppCompileError

    def compiler(*_: object, **__: object) -> None:
        raise CppCompileError(["g++", *["-I/a/long/path"] * 99], "/usr/bin/ld: cannot find -lcuda\ncollect2: error\n")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compiler)
    with pytest.raises(BadInput) as error:
        INDUCTOR.compile(source, AOTI)
    assert str(error.value) == "inductor: the model does not compile: /usr/bin/ld: cannot find -lcuda collect2: error"


def test_the_first_replay_of_a_block_is_not_counted() -> None:
    """It finds cold caches, as everywhere."""
    replays: list[float] = []

    class Event(SimpleNamespace):
        def record(self) -> None:
            self.at = sum(replays)

        def synchronize(self) -> None: ...

        def elapsed_time(self, later: Event) -> float:
            return later.at - self.at

    runner = object.__new__(CudaAotiRunner)
    runner._torch = SimpleNamespace(cuda=SimpleNamespace(Event=lambda enable_timing: Event(), synchronize=lambda: None))
    runner._graph = SimpleNamespace(replay=lambda: replays.append(1.0 if replays else 1000.0))
    assert runner.block(0, 3) == [1e-3] * 3


class FakeCuda(SimpleNamespace):
    """`torch.cuda` as far as a runner calls it; a capture raises `fails`: ``within``, at its ``end``, or not."""

    def __init__(self, fails: str | None) -> None:
        self.fails, self.capturing, self.replays, self.drawing = fails, False, 0, True
        self.current = self.first = SimpleNamespace(wait_stream=lambda other: None)
        self.default_generators = [SimpleNamespace(clone_state=lambda: True, graphsafe_set_state=self.may_draw)]
        super().__init__(Stream=lambda: SimpleNamespace(wait_stream=lambda other: None, synchronize=lambda: None))

    def may_draw(self, state: bool) -> None:
        self.drawing = state

    def current_device(self) -> int:
        return 0

    def current_stream(self) -> object:
        return self.current

    def synchronize(self) -> None: ...

    @contextmanager
    def stream(self, stream: SimpleNamespace) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def CUDAGraph(self) -> SimpleNamespace:
        return SimpleNamespace(replay=lambda: setattr(self, "replays", self.replays + 1))

    @contextmanager
    def graph(self, graph: object) -> Iterator[None]:
        before, self.current, self.capturing = self.current, self.Stream(), True
        try:
            yield
        finally:
            self.capturing = False
            if self.fails is not None:
                self.drawing = False
                raise RuntimeError("operation failed due to a previous error during capture")
        self.current = before

    class Event(SimpleNamespace):
        def record(self) -> None: ...

        def synchronize(self) -> None: ...

        def elapsed_time(self, later: object) -> float:
            return 2.0


@pytest.mark.parametrize("fails", [None, "within", "end"])
def test_what_no_graph_can_hold_is_launched_plainly(
    fails: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A package that waits for the GPU, or allocates beside PyTorch, ended the run after hours of search."""
    monkeypatch.setattr(_common, "_said", set())
    cuda = FakeCuda(fails)
    launched: list[tuple[bool, bool]] = []

    def model(images: np.ndarray) -> np.ndarray:
        launched.append((cuda.capturing, torch.backends.cudnn.allow_tf32))
        if cuda.capturing and fails == "within":
            raise RuntimeError("operation not permitted when stream is capturing")
        return images

    runner = object.__new__(CudaAotiRunner)
    runner._torch = SimpleNamespace(  # type: ignore[assignment]
        cuda=cuda, from_numpy=lambda array: SimpleNamespace(to=lambda device, copy: array)
    )
    runner._meta, runner._batch, runner._model = {"inputs": {"images": [1, 3, 4, 4]}}, 1, model
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True
    try:
        runner.bind({"images": np.zeros((1, 3, 4, 4), np.float32)})
        assert launched == [(False, False)] * 3 + [(True, False)]
        runner.call()
        assert runner.block(0, 2) == [2e-3] * 2
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cudnn.allow_tf32 = before
    assert launched[4:] == ([] if fails is None else [(False, False)] * 4), "with the first of the block, not counted"
    assert cuda.replays == (4 if fails is None else 0)
    assert cuda.current is cuda.first and cuda.drawing, "what trains later finds its stream and its random numbers"
    assert (runner._results is None) == (fails is not None)
    why = {"within": "not permitted when stream is capturing", "end": "failed due to a previous error"}
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == (fails is not None) and all(
        why[str(fails)] in line and "kernel by kernel" in line for line in told
    )


def test_a_gpu_that_a_capture_has_broken_is_one_line() -> None:
    cuda = FakeCuda("end")
    cuda.synchronize = lambda: (_ for _ in ()).throw(RuntimeError("CUDA error: an illegal memory access"))
    runner = object.__new__(CudaAotiRunner)
    runner._torch = SimpleNamespace(  # type: ignore[assignment]
        cuda=cuda, from_numpy=lambda array: SimpleNamespace(to=lambda device, copy: array)
    )
    runner._meta, runner._batch, runner._model = {"inputs": {"images": [1, 3, 4, 4]}}, 1, lambda images: images
    with pytest.raises(BadInput, match="package cannot be run: CUDA error: an illegal memory access"):
        runner.bind({"images": np.zeros((1, 3, 4, 4), np.float32)})


def test_preparing_leaves_the_program_as_it_was(source: CompileInput) -> None:
    """It is prepared again when an engine is built again, or for another precision."""
    program = source.exported_program
    assert program is not None
    before = {name: value.clone() for name, value in program.state_dict.items()}
    prepare(source, "fp16", "cpu")
    assert before.keys() == program.state_dict.keys()
    for name, value in program.state_dict.items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)  # the type, too


def test_single_precision_is_put_back() -> None:
    backends = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [backend.allow_tf32 for backend in backends]
    with pytest.raises(ZeroDivisionError), single_means_single():
        assert not any(backend.allow_tf32 for backend in backends)
        1 / 0  # noqa: B018
    assert [backend.allow_tf32 for backend in backends] == before


def test_the_cpus_features_are_known_here() -> None:
    flags = cpu_flags()
    assert flags == sorted(flags)
    assert any(flag.startswith(("avx", "asimd")) for flag in flags)


def test_engines_depend_on_what_was_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured of those that were not is not theirs."""
    inductor = get_backend("inductor")
    monkeypatch.delenv("PASSDEPLOY_MAX_AUTOTUNE", raising=False)
    assert inductor.libraries() == inductor.version()
    monkeypatch.setenv("PASSDEPLOY_MAX_AUTOTUNE", "1")
    assert inductor.libraries() == f"{inductor.version()}, max_autotune"


def test_no_compiler_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert INDUCTOR.available(AOTI) == "no C++ compiler; apt-get install g++ (or set CXX)"


def test_wrong_inputs_are_named(built: Engine) -> None:
    with INDUCTOR.runner(built, AOTI) as runner, pytest.raises(BadInput, match="shape"):
        runner.run({"images": np.zeros((1, 3, 4, 4), np.float32)})


def test_the_kernels_operator_goes_through_the_compiler(tmp_path: Path) -> None:
    """`compile --masked`: a package that calls `masked_affine_act` computes what the thin network does."""
    from passdeploy.export import export_onnx, export_program
    from passdeploy.groups import find_groups
    from passdeploy.groups.check import random_structure
    from passdeploy.kernels.masked_forward import masked_network
    from passdeploy.surgery import thin
    from tests.scripted import tiny_resnet

    torch.manual_seed(0)
    network, images = tiny_resnet().eval(), torch.rand(3, 3, 16, 12)
    groups = find_groups(network, images[:1])
    structure = random_structure(groups, 2)
    program = export_program(masked_network(network, groups, structure), images[:1].numpy())
    calls = [node for node in program.graph.nodes if "masked_affine_act" in str(node.target)]
    assert len(calls) >= 10
    plain = masked_network(network, groups, structure, plain=True)
    path = export_onnx(plain, tmp_path / "masked.onnx", (3, 16, 12))
    engine = INDUCTOR.compile(CompileInput(path, program), AOTI)
    with torch.no_grad():
        expected = thin(network, groups, structure).eval()(images).numpy()
    with INDUCTOR.runner(engine, AOTI) as runner:
        logits = runner.run({"images": images.numpy()})["logits"]
    assert difference(expected, logits) <= 1e-4
    saved = INDUCTOR.save(engine, tmp_path / "masked")
    np.save(tmp_path / "images.npy", images.numpy())
    command = [sys.executable, "-c", FRESH, str(saved), str(tmp_path / "images.npy"), str(tmp_path / "logits.npy")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(np.load(tmp_path / "logits.npy"), logits)


FRESH = """
import sys
import numpy as np
from pathlib import Path
from passdeploy.engines.base import get_backend
from passdeploy.engines.files import load_engine
from passdeploy.targets import Target
target = Target("cpu", "test", None, "inductor", "fp32", 1, 1, True)
assert "passdeploy.kernels.masked_op" not in sys.modules, "nothing is tested where the operator is there already"
with get_backend("inductor").runner(load_engine(Path(sys.argv[1])), target) as runner:
    np.save(sys.argv[3], runner.run({"images": np.load(sys.argv[2])})["logits"])
"""
"""Runs an engine where nothing else has registered operators: what `bench` and a bundle do."""


@pytest.mark.parametrize(("found", "given", "then"), [
    ("/opt/toolkit", None, "/opt/toolkit"), ("/opt/toolkit", "/mine", "/mine"), (None, None, None),
])  # fmt: skip
def test_a_gpus_compiler_is_told_where_the_toolkit_is(
    source: CompileInput, monkeypatch: pytest.MonkeyPatch, found: str | None, given: str | None, then: str | None
) -> None:
    """Else it looks for the stub of libcuda nowhere, and what it links with -lcuda has none."""
    from torch.utils import cpp_extension

    from passdeploy.engines import _aoti

    told: list[str | None] = []

    def compiler(program: object, package_path: str, inductor_configs: dict[str, object]) -> None:
        told.append(os.environ.get("CUDA_HOME"))
        Path(package_path).write_bytes(b"package")

    monkeypatch.setenv("CUDA_HOME", given or "set and unset again, so that it is put back")
    if given is None:
        monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", found)
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compiler)
    monkeypatch.setattr(_aoti, "prepare", lambda *_: None)
    INDUCTOR.compile(source, replace(AOTI, compute_capability="9.0", precision="fp16"))
    assert told == [then]
