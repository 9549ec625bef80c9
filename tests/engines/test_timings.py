"""Kernel timings that builds share: whatever is wrong with their file, the engine that was built is kept."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from passdeploy.engines import _trt
from passdeploy.engines._child import environment
from passdeploy.engines._timings import keep, own_copy
from passdeploy.engines.base import get_backend
from passdeploy.engines.tensorrt_rtx import TensorRtRtx
from tests.engines.conftest import A100, Case

pytest.importorskip("polygraphy", reason="polygraphy is not installed: pip install 'passdeploy[rtx]'")
RTX = TensorRtRtx()
needs_rtx = pytest.mark.skipif(RTX.available(A100) is not None, reason=f"tensorrt_rtx: {RTX.available(A100)}")


class Timings:
    """An `ITimingCache` as far as it is used."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def combine(self, other: Timings, ignore_mismatch: bool) -> bool:
        self.content += other.content
        return True

    def serialize(self) -> nullcontext[bytes]:
        return nullcontext(self.content)


class Config:
    """An `IBuilderConfig` likewise."""

    def __init__(self, content: bytes) -> None:
        self.timings = Timings(content)

    def get_timing_cache(self) -> Timings:
        return self.timings

    def create_timing_cache(self, content: bytes) -> Timings:
        return Timings(content)


def test_what_was_timed_is_added_to_what_is_there(tmp_path: Path) -> None:
    shared = tmp_path / "gpu.timing"
    assert keep(Config(b"one "), str(shared)) is None and shared.read_bytes() == b"one "
    assert keep(Config(b"two "), str(shared)) is None and shared.read_bytes() == b"two one "
    assert Path(own_copy(str(shared), tmp_path)).read_bytes() == b"two one "


def test_what_cannot_be_read_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for name in ("none", "folder"):
        assert not Path(own_copy(str(tmp_path / name), tmp_path)).exists()


def test_what_cannot_be_written_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = tmp_path / "gpu.timing"
    shared.write_bytes(b"before")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    told = keep(Config(b"more"), str(shared))
    assert told is not None and "No space left on device" in told and shared.read_bytes() == b"before"


BUILD = """
import json, sys
import tensorrt_rtx
from polygraphy.backend.tensorrt_rtx import CreateConfigRTX
from passdeploy.engines import _trt_child as child
child.RTX, child._library = False, lambda: tensorrt_rtx  # full TensorRT's way, in the one that is here
child._config = lambda job: CreateConfigRTX(compute_capabilities=[(8, 0)])
print(json.dumps(child.build(json.loads(sys.argv[1]))))
"""


@needs_rtx
@pytest.mark.parametrize("name", ["no folder/gpu.timing", "gpu.timing"])
def test_an_engine_is_kept_where_its_timings_are_not(case: Case, tmp_path: Path, name: str) -> None:
    """Their folder is gone, or a folder has the name of their lock."""
    (tmp_path / "gpu.timing.lock").mkdir()
    options = {"timing_cache": str(tmp_path / name)}
    job = {"onnx": str(case.onnx), "engine": str(tmp_path / "engine"), "options": options}
    command = [sys.executable, "-c", BUILD, json.dumps(job)]
    done = subprocess.run(command, env=environment(RTX.environment), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    built = json.loads(done.stdout.splitlines()[-1])
    assert "kernel timings are not kept" in built["remark"] and (tmp_path / "engine").stat().st_size > 10_000


@needs_rtx
def test_a_remark_of_the_build_is_told_once(
    case: Case, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run_job = _trt.run_job
    monkeypatch.setattr(_trt, "run_job", lambda *given, **more: run_job(*given, **more) | {"remark": "timings: full"})
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert get_backend("tensorrt_rtx").compile(case.source, A100).data
    assert [record.getMessage() for record in caplog.records] == ["passdeploy: TensorRT-RTX: timings: full"]
