"""How far builds and loads of one graph lie apart, measured on real engines."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from passdeploy.engines.base import CompileInput, Engine, get_backend
from passdeploy.engines.files import load_engine
from passdeploy.errors import BadInput
from passdeploy.rebuilds import MOST_BUILD_S, TIMES, rebuilds, with_rebuilds
from passdeploy.remarks import build_spread
from passdeploy.reporting import load_report
from passdeploy.reporting.schema import RebuildsInfo
from passdeploy.targets import Target, resolve
from tests.engines.conftest import SIZE, make_case

IMAGES = np.random.default_rng(0).random((1, *SIZE), dtype=np.float32)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, CompileInput, Target]:
    source, target = make_case(tmp_path_factory.mktemp("case"), 1).source, resolve("cpu", backend="onnxruntime")
    return get_backend("onnxruntime").compile(source, target), source, target


def test_loads_of_one_engine(made: tuple[Engine, CompileInput, Target], tmp_path: Path) -> None:
    engine, source, target = made
    record = with_rebuilds(engine, source, target, IMAGES)
    assert record.data == engine.data, "what ships stays as it is"
    found = record.meta["rebuilds"]
    assert (found["of"], found["n"], found["reason"]) == ("loads", TIMES, None)
    assert len(found["latency_ms"]) == TIMES and min(found["latency_ms"]) > 0
    low, middle, high = sorted(found["latency_ms"])
    assert found["spread"] == pytest.approx((high - low) / middle)
    kept = load_engine(get_backend("onnxruntime").save(record, tmp_path))
    assert kept.meta["rebuilds"]["spread"] == found["spread"]


def test_end_to_end(made: tuple[Engine, CompileInput, Target]) -> None:
    assert rebuilds(*made, IMAGES, "end_to_end").n == TIMES


def test_a_backend_whose_builds_vary_builds_again(
    made: tuple[Engine, CompileInput, Target], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, source, target = made
    backend, built = get_backend("onnxruntime"), []

    def build(*given: object) -> Engine:
        built.append(given)
        return replace(engine, meta={**engine.meta, "another": True})

    monkeypatch.setattr(backend, "builds_vary", lambda target: True)
    monkeypatch.setattr(backend, "rebuild", build)
    found = rebuilds(engine, source, target, IMAGES, "engine")
    assert (found.of, found.n) == ("builds", TIMES)
    assert built == [(source, target)] * (TIMES - 1), "the engine that ships is one of them"

    slow = replace(engine, meta={**engine.meta, "build_s": 2 * MOST_BUILD_S})
    assert rebuilds(slow, source, target, IMAGES, "engine").reason == "a build takes 600 s"
    assert len(built) == TIMES - 1

    def broken(*given: object) -> Engine:
        raise BadInput("TensorRT: its process was killed")

    monkeypatch.setattr(backend, "rebuild", broken)
    found = rebuilds(engine, source, target, IMAGES, "engine")
    assert (found.of, found.n, found.spread) == (None, 0, None)
    assert found.reason == "TensorRT: its process was killed", "the run goes on with the engine it has"


def test_a_runtime_that_has_no_memory_for_all_of_them_costs_no_run(
    made: tuple[Engine, CompileInput, Target], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise RuntimeError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr("passdeploy.rebuilds.interleave", full)
    found = rebuilds(*made, IMAGES, "engine")
    assert (found.of, found.n, found.spread) == (None, 0, None)
    assert found.reason == "one of the engines cannot be run: CUDA out of memory. Tried to allocate"


def test_without_the_target_nothing_is_claimed(made: tuple[Engine, CompileInput, Target]) -> None:
    engine, source, target = made
    away = replace(target, device="NVIDIA H100", attached=False)
    found = rebuilds(engine, source, away, IMAGES, "engine")
    assert (found.of, found.n, found.spread, found.latency_ms) == (None, 0, None, ())
    assert found.reason == "no NVIDIA H100 is attached to this machine"


def test_which_builds_vary() -> None:
    gpu = replace(resolve("cpu"), compute_capability="8.0")
    varying = {"tensorrt", "torch_tensorrt", "inductor"}
    for name in ("tensorrt", "tensorrt_rtx", "torch_tensorrt", "inductor", "onnxruntime", "onnxruntime_tensorrt"):
        assert get_backend(name).builds_vary(gpu) == (name in varying)
    assert not get_backend("inductor").builds_vary(resolve("cpu"))


def test_the_record_reaches_the_report(single: Path) -> None:
    report = load_report(single / "report.json")
    facts = json.loads((single / "engine" / "engine.json").read_text())
    assert report.rebuilds is not None and report.rebuilds.of == "loads"
    assert report.rebuilds.model_dump(mode="json") == facts["meta"]["rebuilds"]


def test_only_builds_that_differ_are_worth_a_sentence() -> None:
    def said(**fields: Any) -> list[str]:
        return build_spread(RebuildsInfo(**fields))

    (line,) = said(of="builds", n=3, spread=0.0213, latency_ms=[1.0, 1.01, 0.99])
    assert line.startswith("3 builds of the same graph lie 2.1% apart")
    assert not said(of="loads", n=3, spread=0.02)
    assert not said(reason="no NVIDIA H100 is attached")
    assert not build_spread(None)
