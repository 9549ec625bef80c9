"""passdeploy.kernels.driver with the real cuda-bindings, over a libcuda whose one device is the emulator."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from passdeploy.kernels import build
from tests.kernels.emulated import HERE, PARAMS, build_library, have_compiler

pytestmark = [
    pytest.mark.skipif(not have_compiler(), reason="g++ is not installed; it stands in for the GPU"),
    pytest.mark.skipif(
        importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None,
        reason="cuda-bindings is not installed: pip install 'passdeploy[cuda]'",
    ),
]
# One process for all of it: importing torch is what takes time. A test reads what its section printed.
SCRIPT = """
import threading
import warnings
import torch
from passdeploy.errors import PassdeployError
from passdeploy.kernels import build, dispatch, driver, masked_op, reference
from passdeploy.kernels.geometry import Launch

x, c = torch.randn(2, 5, 7, 7), torch.randn(3, 5)
args = (x, c[0], c[1], c[2], None, "silu")
shape = masked_op.shape_of(x)
expected = reference.forward(*args)

def check(loader):
    y = masked_op.forward_on(loader, shape, *args)
    assert (y - expected).abs().max() < 1e-5

def section(name):
    print("==", name, flush=True)

section("first use")
build.prebuilt = lambda source: None
loader = driver.default_loader()
check(loader); check(loader)

section("packaged code")
build.prebuilt, compiled, build.compiled = lambda source: b"\\x7fELF of ours", build.compiled, None
check(driver.CudaBindings())

section("refused code")
build.prebuilt, build.compiled = lambda source: b"for another GPU", compiled
check(driver.CudaBindings())

section("contexts")
driver_of = loader._driver
assert int(driver_of.cuCtxGetCurrent()[1]) == 0x100
second = driver.default_loader(1)
thread = threading.Thread(target=check, args=(second,)); thread.start(); thread.join()
check(driver.default_loader(0)); check(second)
with second._context() as inside:
    assert inside == 0x101 == int(driver_of.cuCtxGetCurrent()[1])
assert int(driver_of.cuCtxGetCurrent()[1]) == 0x100

section("stream and backward")
dispatch.stream_of = lambda device: 77
g = torch.randn_like(x)
got = masked_op.backward_on(loader, shape, g, *args, True, True, False)
for a, b in zip(got[:4], reference.backward(g, *args)):
    assert (a - b).abs().max() < 1e-4 * max(1, b.abs().max())

section("waiting")
loader.wait(77, 5)

section("devices")
print(driver.device_of(4096), driver.device_of(2**63 + 4096))
dispatch.loader(1)

section("nothing to load")
build.compiled, kept = lambda *given: (_ for _ in ()).throw(PassdeployError("no NVRTC")), build.compiled
dispatch.loader.cache_clear()
with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    print(dispatch.loader(0), *(str(w.message).splitlines()[0] for w in warned))
build.compiled = kept

section("error")
launch = shape.forward("relu")
try:
    loader.launch(Launch("masked_affine_act_nonsense", launch.grid, 256, 0, launch.params), 0)
except PassdeployError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What each section printed."""
    folder = tmp_path_factory.mktemp("libcuda")
    command = ["g++", "-std=c++17", "-O1", "-fPIC", "-shared", "-Wl,-soname,libcuda.so.1", str(HERE / "driver.cpp")]
    subprocess.run([*command, "-ldl", "-o", str(folder / "libcuda.so.1")], check=True)
    kernels = [build_library(build.source_folder() / f"{source}.cu", PARAMS[source]) for source in build.SOURCES]
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(folder),
        "EMULATED_KERNELS": ":".join(map(str, kernels)),
        "XDG_CACHE_HOME": str(folder),
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-2000:]
    parts = (part.split("\n") for part in done.stdout.split("== ")[1:])
    return {name: lines[:-1] for name, *lines in parts}


def test_compiles_loads_once_and_launches(said: dict[str, list[str]]) -> None:
    assert said["first use"] == ["load cubin", "launch context 0 stream 0", "launch context 0 stream 0"]


def test_machine_code_of_the_package_comes_first(said: dict[str, list[str]]) -> None:
    assert said["packaged code"] == ["load cubin", "launch context 0 stream 0"]


def test_machine_code_that_the_driver_refuses_is_compiled_anew(said: dict[str, list[str]]) -> None:
    assert said["refused code"] == ["load other", "load cubin", "launch context 0 stream 0"]


def test_a_device_has_its_own_context_on_every_thread(said: dict[str, list[str]]) -> None:
    """PyTorch's backward runs on threads of its own, where no context may be current yet."""
    assert [line.split()[2] for line in said["contexts"] if line.startswith("launch")] == ["1", "0", "1"]


def test_stream_and_backward(said: dict[str, list[str]]) -> None:
    assert said["stream and backward"] == ["launch context 0 stream 77"] * 2


def test_a_stream_waits_for_another_without_the_caller(said: dict[str, list[str]]) -> None:
    assert said["waiting"] == ["record event 2 stream 5", "stream 77 waits for event 2"]  # 2: no timing


def test_the_gpu_that_an_array_lies_on_is_asked_for(said: dict[str, list[str]]) -> None:
    assert said["devices"][0] == "0 1"
    assert said["devices"][1:] == ["load other", "load cubin"] * 2, "all code is loaded before the first launch"


def test_code_that_cannot_be_loaded_is_done_without(said: dict[str, list[str]]) -> None:
    assert said["nothing to load"][-1] == "None passdeploy's CUDA kernels are replaced by PyTorch's: no NVRTC"


def test_errors_carry_the_drivers_name(said: dict[str, list[str]]) -> None:
    assert said["error"] == ["CUDA driver: CUDA_ERROR_NOT_FOUND"]
