"""Saved engines, timed side by side by processes of their own."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from passdeploy.engines import base
from passdeploy.engines.base import CompileInput, get_backend
from passdeploy.engines.files import load_engine
from passdeploy.errors import BadInput
from passdeploy.export import export_onnx
from passdeploy.latency.measure import Settings
from passdeploy.latency.measurement import Comparison, Measurement, pooled
from passdeploy.targets import resolve
from passdeploy.timing import compare_files, open_runner
from tests.scripted import tiny_resnet

SHAPE = (3, 16, 12)
SHORT = Settings(pairs=3, block_s=0.002, warmup_s=0.002, precise=None, percentiles=(50.0, 99.0), processes=6)
IMAGES = np.zeros((1, *SHAPE), dtype=np.float32)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine")
    target = resolve("cpu")
    onnx = export_onnx(tiny_resnet().eval(), folder / "model.onnx", SHAPE)
    backend = get_backend(target.backend)
    backend.save(backend.compile(CompileInput(onnx), target), folder / "engine")
    return folder / "engine"


def test_a_fresh_process_loads_and_times_the_files(engine: Path) -> None:
    found = compare_files({"dense": engine, "thin": engine}, resolve("cpu"), IMAGES, "engine", SHORT)
    assert list(found.measurements) == ["dense", "thin"]
    assert found.reference == "dense"
    needed = 662 / SHORT.processes
    assert all(m.n >= needed and 0 < m.floor <= m.p50 for m in found.measurements.values())  # type: ignore[operator]
    assert len(found.pairs["thin"]) >= SHORT.pairs


def test_the_scope_is_passed_on(engine: Path) -> None:
    found = compare_files({"dense": engine, "thin": engine}, resolve("cpu"), IMAGES, "end_to_end", SHORT)
    assert found.measurements["thin"].n > 0


def test_it_is_refused_what_this_process_would_refuse(engine: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "engine"
    damaged.mkdir()
    for path in engine.iterdir():
        data = path.read_bytes()
        (damaged / path.name).write_bytes(data if path.suffix == ".json" else data[:-1] + b"?")
    with pytest.raises(BadInput, match=r"timing in a process of its own: .*SHA-256 differs"):
        compare_files({"dense": engine, "thin": damaged}, resolve("cpu"), IMAGES, "engine", SHORT)


def test_torch_is_not_loaded_to_time_an_engine() -> None:
    import subprocess
    import sys

    code = "import passdeploy.timing, sys; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def process(ratio: float, calls: int = 20) -> Comparison:
    def engine(ms: float) -> Measurement:
        return Measurement(ms, ms, None, ms, calls, 0.01, 3, 1, (ms,) * calls, ms)

    return Comparison({"dense": engine(2.0), "thin": engine(2.0 / ratio)}, {"dense": (1.0,) * 9, "thin": (ratio,) * 9},
                      "dense")  # fmt: skip


def test_a_process_is_one_sample() -> None:
    """Nine rounds of one process agree to the last digit; what the next process finds is another matter."""
    found = pooled([process(r) for r in (2.01, 1.99, 2.03, 2.0, 2.02, 1.98)])
    ratio = found.ratio("thin")
    assert (ratio.value, ratio.low, ratio.high, ratio.n) == (2.005, 1.98, 2.03, 6)
    assert found.measurements["dense"].n == 120
    assert found.measurements["dense"].disturbed == 6
    assert found.measurements["thin"].p50 == pytest.approx(1.0, rel=0.02)
    assert Comparison.from_json(found.to_json()).ratio("thin") == ratio


def test_what_is_too_little_alone_is_enough_together() -> None:
    few = [process(2.0, calls=120) for _ in range(6)]
    assert pooled(few[:5]).measurements["thin"].p99 is None
    assert pooled(few).measurements["thin"].p99 == 1.0


def test_five_processes_do_not_say_how_far_the_next_may_be() -> None:
    ratio = pooled([process(r) for r in (2.0, 2.01, 2.02, 2.03, 2.04)]).ratio("thin")
    assert (ratio.low, ratio.high) == (0.0, float("inf"))


def test_a_users_files_are_found_after_all_others(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A statistics.py beside a user's data is no part of Python, and a backend of the user's own is found."""
    (tmp_path / "statistics.py").write_text("raise SystemExit('not this one')\n")
    backend = (
        "from passdeploy.engines.base import register\n"
        "from passdeploy.engines.onnxruntime import OnnxRuntime\n\n\n"
        "@register\n"
        "class Mine(OnnxRuntime):\n"
        "    name = 'mine'\n"
    )
    (tmp_path / "my_own_backend.py").write_text(backend)
    monkeypatch.chdir(tmp_path)
    compare_files({"dense": engine, "thin": engine}, resolve("cpu"), IMAGES, "engine", SHORT)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))
    importlib.import_module("my_own_backend")
    target = resolve("cpu", backend="mine")
    mine = get_backend("mine")
    mine.save(mine.compile(CompileInput(engine.parent / "model.onnx"), target), tmp_path / "mine")
    found = compare_files({"dense": tmp_path / "mine"}, target, IMAGES, "engine", SHORT)
    assert found.measurements["dense"].n > 0


def test_an_engine_of_several_inputs_is_refused_before_it_is_loaded(
    engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once loaded nobody would close it, and on a GPU it would keep its memory."""
    loaded = load_engine(engine)
    several = replace(loaded, meta={**loaded.meta, "inputs": {"images": [1, *SHAPE], "masks": [1, *SHAPE]}})
    backend = get_backend(loaded.backend)
    monkeypatch.setattr(type(backend), "runner", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(BadInput, match="takes 2 inputs"):
        open_runner(several, resolve("cpu"), IMAGES)
