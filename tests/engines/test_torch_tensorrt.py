"""Torch-TensorRT as far as it goes without it: a stand-in notes what it is asked for."""

from __future__ import annotations

import os
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils import cpp_extension

from passdeploy.engines import _aoti, torch_tensorrt
from passdeploy.engines.base import Engine, get_backend
from passdeploy.errors import BadInput, Unavailable
from tests.engines.conftest import A100, Case

BACKEND = get_backend("torch_tensorrt")
TARGET = A100.with_(backend="torch_tensorrt", attached=True)


class Library:
    """What it was called under, and what it raises when it saves."""

    def __init__(self) -> None:
        self.modes: list[tuple[bool, bool, str | None]] = []
        self.error: Exception | None = None
        self.linked: Path | None = None
        self.timings = b""

    def compile(self, program: object, **options: Any) -> object:
        if "timing_cache_path" in options:  # read, added to, and written in place
            timings = Path(options["timing_cache_path"])
            self.timings = (timings.read_bytes() if timings.exists() else b"") + b"kernel "
            timings.write_bytes(self.timings[:3] if self.error else self.timings)
        tf32 = torch.backends.cudnn.allow_tf32
        self.modes.append((tf32, torch.is_grad_enabled(), os.environ.get("CUDA_HOME")))
        return program

    def save(self, compiled: object, path: str, **options: Any) -> None:
        self.compile(compiled)
        if self.error is not None:
            raise self.error
        Path(path).write_bytes(b"package")
        if self.linked is not None:
            with zipfile.ZipFile(path, "w") as archive:
                archive.write(self.linked, f"data/aotinductor/model/{self.linked.name}")


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    made = Library()
    modules: dict[str, Any] = {name: ModuleType(name) for name in ("torch_tensorrt", "tensorrt")}
    modules["torch_tensorrt"].__version__, modules["tensorrt"].__version__ = "2.13.0+cu130", "11.1.0"
    modules["torch_tensorrt"].dynamo, modules["torch_tensorrt"].save = made, made.save
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(_aoti, "prepare", lambda *_: None)
    monkeypatch.setattr(torch, "rand", lambda *_, **__: None)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", "/opt/toolkit")
    monkeypatch.setenv("CUDA_HOME", "set and unset again, so that it is put back")
    monkeypatch.delenv("CUDA_HOME")
    return made


def test_it_is_compiled_as_inductors_packages_are(case: Case, library: Library) -> None:
    engine = BACKEND.compile(case.source, TARGET)
    assert library.modes == [(False, False, "/opt/toolkit")] * 2, "no TF32, no gradients, the toolkit named"
    assert (engine.data, engine.meta["torch_tensorrt"], engine.meta["tensorrt"]) == (
        b"package", "2.13.0+cu130", "11.1.0",
    )  # fmt: skip
    library.error = RuntimeError(f"g++ {'-I/a/long/path ' * 99}\nOutput:\n/usr/bin/ld: cannot find -lcuda\n")
    with pytest.raises(BadInput, match=r"does not compile: /usr/bin/ld: cannot find -lcuda$"):
        BACKEND.compile(case.source, TARGET)


INSTALLED = """
print("import error when try to import _TensorRTProxyModule")
import pwd
NAME = pwd.getpwuid(4242)[0]
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package that asks for the name of user 4242 as it is imported, as `torch_tensorrt.dynamo._defaults` does."""
    (tmp_path / "torch_tensorrt").mkdir()
    (tmp_path / "torch_tensorrt" / "__init__.py").write_text(INSTALLED)
    monkeypatch.syspath_prepend(tmp_path)
    torch_tensorrt._not_imported.cache_clear()
    yield
    torch_tensorrt._not_imported.cache_clear()


@pytest.mark.usefixtures("installed")
def test_a_user_without_a_name_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``docker run --user`` makes them."""
    assert BACKEND.available(TARGET) is None
    monkeypatch.setattr(os, "getuid", lambda: 4242)
    assert "user 4242 has none here; start the container with -v /etc/passwd" in str(BACKEND.available(TARGET))


@pytest.mark.usefixtures("installed")
def test_an_import_that_fails_is_one_line(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    reason = BACKEND.runnable(TARGET)
    assert reason is not None and "can't be imported: 'getpwuid(): uid not found: 4242'" in reason
    with pytest.raises(Unavailable, match="can't be imported"):
        BACKEND.compile(case.source, TARGET)
    assert capsys.readouterr().out == "", "what it prints would spoil --json"


def test_no_second_copy_of_the_engines_is_left(
    case: Case, library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    library.linked = tmp_path / "ab/cabx.wrapper.so"
    library.linked.parent.mkdir()
    library.linked.write_text("engines")
    engine = BACKEND.compile(case.source, TARGET)
    assert engine.data.startswith(b"PK") and not library.linked.exists()


def test_kernel_timings_are_shared_and_never_half_written(
    case: Case, library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    BACKEND.compile(case.source, TARGET)
    (kept,) = (tmp_path / "passdeploy").glob("*.timing")
    assert kept.read_bytes() == b"kernel "
    library.error = RuntimeError("no space left")
    with pytest.raises(BadInput, match="no space left"):
        BACKEND.compile(case.source, TARGET)
    assert kept.read_bytes() == b"kernel ", "what an interruption leaves would end every later build"
    library.error = None
    BACKEND.compile(case.source, TARGET)
    assert library.timings == kept.read_bytes() == b"kernel kernel "
    BACKEND.rebuild(case.source, TARGET)
    assert library.timings == b"kernel " and kept.read_bytes() == b"kernel kernel "


def test_a_package_beside_another_library_is_refused(
    case: Case, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = BACKEND.compile(case.source, TARGET)
    monkeypatch.setattr(_aoti, "CudaAotiRunner", lambda *given: given[0])

    def load(**meta: str) -> object:
        return BACKEND.runner(Engine(engine.backend, engine.data, engine.suffix, {**engine.meta, **meta}), TARGET)

    assert load() == load(torch_tensorrt="2.13.0+cu126") == b"package"
    with pytest.raises(
        BadInput, match=r"made by tensorrt 10.13.3, this is 11.1.0; compile .* install tensorrt 10.13.3$"
    ):
        load(tensorrt="10.13.3")
    with pytest.raises(BadInput, match=r"made by torch_tensorrt 2.12.0, this is 2.13.0\+cu130"):
        load(torch_tensorrt="2.12.0")
    del engine.meta["tensorrt"]  # as packages of before
    with pytest.raises(BadInput, match=r"does not tell which tensorrt made it; compile it again here$"):
        load()


@pytest.mark.parametrize("backend", ["torch_tensorrt", "onnxruntime_tensorrt"])
def test_engines_depend_on_the_tensorrt_beneath(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """Another one is another engine and another latency, and a resumed run has to notice."""
    told = set()
    for tensorrt in ("10.9.0", "10.13.2"):
        monkeypatch.setattr("importlib.metadata.version", lambda name, found=tensorrt: found)
        told.add(get_backend(backend).libraries())
    assert len(told) == 2 and all("tensorrt 10." in each for each in told)
