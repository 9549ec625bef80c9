"""The sources compile: by nvcc for every architecture, each alone, and by NVRTC. None of it needs a GPU."""

from __future__ import annotations

import ctypes
import errno
import importlib.util
import itertools
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from passdeploy.errors import PassdeployError, Unavailable
from passdeploy.kernels import build, geometry
from tests.kernels.emulated import have_compiler, library

needs_nvcc = pytest.mark.skipif(build.nvcc_path() is None, reason="nvcc is not installed (CUDA toolkit)")
needs_nvrtc = pytest.mark.skipif(
    importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None,
    reason="cuda-bindings is not installed: pip install 'passdeploy[cuda]'",
)
ELF, CUBIN_MACHINE = b"\x7fELF", 190  # EM_CUDA
TYPES = ("f32", "f16", "bf16")
KERNELS = {
    "masked_affine_act": [
        "masked_affine_act_finish",
        *(f"masked_affine_act_{pass_}_{layout}_{t}" for pass_ in ("forward", "backward")
          for layout in ("nchw", "nhwc") for t in TYPES),
        *(f"masked_affine_act_flat_{residual}{t}" for residual in ("", "residual_") for t in TYPES),
    ],
    "prompted_input": [f"prompted_input_{t}" for t in TYPES],
}  # fmt: skip


def fatbin(source: str) -> bytes:
    """Compiled once per content of the sources: it is the slowest thing here."""
    out = Path(tempfile.gettempdir()) / f"passdeploy-fatbin-{os.getuid()}" / f"{source}-{build.digest(source)}.fatbin"
    if not out.is_file():
        out.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
            build.build_fatbin(source, Path(scratch) / "new")
            (Path(scratch) / "new").replace(out)
    return out.read_bytes()


def members(data: bytes) -> list[tuple[str, int]]:
    """(ptx | cubin, architecture) of each member: the fatbin's header, then a header per member."""
    found, at = [], int.from_bytes(data[6:8], "little")
    end = at + int.from_bytes(data[8:16], "little")
    while at < end:
        kind = {1: "ptx", 2: "cubin"}[int.from_bytes(data[at : at + 2], "little")]
        found.append((kind, int.from_bytes(data[at + 28 : at + 32], "little")))
        at += int.from_bytes(data[at + 4 : at + 8], "little") + int.from_bytes(data[at + 8 : at + 16], "little")
    return found


@needs_nvrtc
@pytest.mark.skipif(build.nvcc_path() is not None, reason="nvcc is here, and does it for the fatbin")
@pytest.mark.parametrize(("source", "architecture"), itertools.product(build.SOURCES, build.ARCHITECTURES))
def test_every_architecture_compiles(source: str, architecture: int) -> None:
    assert build.compile_nvrtc(source, architecture)[:4] == ELF


@needs_nvcc
@pytest.mark.parametrize("source", build.SOURCES)
def test_every_architecture_is_in_the_fatbin(source: str) -> None:
    expected = {("cubin", a) for a in build.ARCHITECTURES} | {("ptx", build.PTX)}
    assert set(members(fatbin(source))) == expected


@needs_nvcc
@pytest.mark.parametrize("source", build.SOURCES)
def test_each_source_compiles_alone(source: str, tmp_path: Path) -> None:
    """The very command of the documentation, in a folder of its own."""
    out = tmp_path / "out.cubin"
    folder = build.source_folder()
    command = [build.nvcc_path(), "-std=c++17", "-I", folder, "-cubin", folder / f"{source}.cu", "-o", out]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    code = out.read_bytes()
    assert code[:4] == ELF and int.from_bytes(code[18:20], "little") == CUBIN_MACHINE
    for kernel in KERNELS[source]:
        assert b"\0" + kernel.encode() + b"\0" in code


@needs_nvrtc
@pytest.mark.parametrize("source", build.SOURCES)
def test_nvrtc_makes_machine_code(source: str) -> None:
    code = build.compile_nvrtc(source, 80)
    assert code[:4] == ELF and int.from_bytes(code[18:20], "little") == CUBIN_MACHINE
    for kernel in KERNELS[source]:
        assert b"\0" + kernel.encode() + b"\0" in code


@needs_nvrtc
def test_nvrtc_makes_ptx_for_a_device_it_does_not_know() -> None:
    assert b".target sm_121" in build.compile_nvrtc("prompted_input", 199)


@needs_nvrtc
def test_nvrtc_refuses_a_device_that_is_too_old() -> None:
    with pytest.raises(Unavailable, match="no architecture"):
        build.compile_nvrtc("prompted_input", 35)


@needs_nvrtc
def test_nvrtc_shows_what_the_compiler_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "masked_affine_act.cu").write_text("this is no CUDA")
    monkeypatch.setattr(build, "source_folder", lambda: tmp_path)
    with pytest.raises(PassdeployError, match=r"(?s)masked_affine_act.*error"):
        build.compile_nvrtc("masked_affine_act", 80)


@pytest.mark.parametrize("refused", [True, False])
def test_nvrtc_writes_into_memory_of_its_own_and_its_program_is_freed(
    monkeypatch: pytest.MonkeyPatch, refused: bool
) -> None:
    """An empty log is one byte, and the interpreter has only one object for each bytes of one."""
    destroyed: list[str] = []

    def write(program: str, buffer: bytearray) -> tuple[int]:
        buffer[0] = 0
        return (0,)

    nvrtc: Any = SimpleNamespace(
        nvrtcGetSupportedArchs=lambda: (0, [80]),
        nvrtcCreateProgram=lambda *_: (0, "program"),
        nvrtcCompileProgram=lambda *_: (6 if refused else 0,),
        nvrtcDestroyProgram=destroyed.append,
    )
    for name in ("ProgramLog", "CUBIN", "PTX"):
        setattr(nvrtc, f"nvrtcGet{name}Size", lambda program: (0, 1))
        setattr(nvrtc, f"nvrtcGet{name}", write)
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(nvrtc=nvrtc))
    if refused:
        with pytest.raises(PassdeployError, match="can't compile prompted_input"):
            build.compile_nvrtc("prompted_input", 80)
    else:
        assert build.compile_nvrtc("prompted_input", 80) == b"\0"
    assert destroyed == ["program"]


@needs_nvrtc
def test_compiled_code_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code = build.compiled("prompted_input", 90)
    (kept,) = (tmp_path / "passdeploy" / "kernels").iterdir()
    assert kept.read_bytes() == code
    monkeypatch.setattr(build, "compile_nvrtc", lambda *_: pytest.fail("compiled again"))
    assert build.compiled("prompted_input", 90) == code


@needs_nvrtc
def test_a_cache_that_can_not_be_written_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(build, "compile_nvrtc", lambda *_: b"code")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert build.compiled("prompted_input", 90) == b"code"


@needs_nvrtc
def test_a_full_disk_keeps_no_pieces_of_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(build, "compile_nvrtc", lambda *_: b"code")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        assert build.compiled("prompted_input", 90) == b"code"
    assert list((tmp_path / "passdeploy" / "kernels").iterdir()) == []
    assert build.compiled("prompted_input", 90) == b"code"
    (kept,) = (tmp_path / "passdeploy" / "kernels").iterdir()
    assert kept.read_bytes() == b"code"


def test_without_nvcc_the_message_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "nvcc_path", lambda: None)
    with pytest.raises(Unavailable, match="CUDA toolkit"):
        build.build_fatbin("prompted_input", tmp_path / "out")


@pytest.mark.parametrize(
    ("source", "struct"),
    [("masked_affine_act", geometry.MaskedAffineActParams), ("prompted_input", geometry.PromptedInputParams)],
)
def test_parameters_are_laid_out_as_in_the_source(source: str, struct: type[ctypes.Structure]) -> None:
    text = "".join(path.read_text() for path in build.source_folder().glob("*.cu*"))
    body = re.search(rf"struct {struct.__name__} {{(.*?)\n}};", text, re.S)
    assert body is not None
    fields = []
    for kind, names in re.findall(r"^  (.*?)(\w+(?:, \w+)*);", body[1], re.M):
        size = 8 if "*" in kind else 4
        fields += [(name, size) for name in names.split(", ")]
    assert fields == [(name, ctypes.sizeof(kind)) for name, kind, *_ in struct._fields_]
    if have_compiler():
        lib = library(build.source_folder() / f"{source}.cu", struct.__name__)
        assert lib.params_size() == ctypes.sizeof(struct)


def test_sources_are_found_without_torch() -> None:
    """The runner of a bundle has no torch: arrays, geometry and build must do without."""
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from passdeploy.kernels import arrays, build, driver, enqueue, geometry\n"
        "assert all((build.source_folder() / f'{s}.cu').is_file() for s in build.SOURCES)"
    )
    subprocess.run([os.sys.executable, "-c", code], check=True)
