"""The kernels on a real GPU: the emulated cases again, and what only hardware can show."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from passdeploy.data.base import Preprocess
from passdeploy.errors import Unavailable
from passdeploy.kernels import build, driver, masked_affine_act, masked_op, prompted_input, stage_input
from passdeploy.kernels.arrays import prompted_input_into
from passdeploy.kernels.geometry import ACTIVATIONS
from passdeploy.search.prompt import InputStage
from tests.gpu.kernel_cases import SCALE, SHIFT, activation_case, input_case, layouts
from tests.kernels.cases import DTYPES, INPUTS, SHAPES, difference, tensors


def _reason() -> str | None:
    if not torch.cuda.is_available():
        return "no NVIDIA GPU, or a PyTorch without CUDA"
    return driver.unavailable()


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(_reason() is not None, reason=str(_reason()))]


@pytest.fixture(scope="module")
def loader() -> driver.CudaBindings:
    torch.zeros(1, device="cuda")
    return driver.CudaBindings()


@pytest.mark.parametrize(("shape", "dtype"), itertools.product(SHAPES, DTYPES))
def test_masked_affine_act(loader: driver.CudaBindings, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for last in layouts(shape):
        for activation, residual in itertools.product(ACTIVATIONS, (False, True)):
            activation_case(loader, shape, dtype, last, activation, residual)


@pytest.mark.parametrize(("dtype", "last", "offset"), itertools.product(DTYPES, (False, True), (1, 3)))
def test_any_alignment(loader: driver.CudaBindings, dtype: torch.dtype, last: bool, offset: int) -> None:
    activation_case(loader, (2, 5, 3, 7), dtype, last, "relu", True, offset)
    for case in INPUTS:
        input_case(loader, case, dtype, last, offset)


@pytest.mark.parametrize(("case", "dtype", "last"), itertools.product(INPUTS, DTYPES, (False, True)))
def test_prompted_input(loader: driver.CudaBindings, case: Any, dtype: torch.dtype, last: bool) -> None:
    input_case(loader, case, dtype, last)


@pytest.mark.parametrize("last", [False, True])
def test_large_tensors_repeat_bit_for_bit(loader: driver.CudaBindings, last: bool) -> None:
    first = activation_case(loader, (16, 96, 57, 57), torch.float16, last, "silu", True)
    for _ in range(3):
        again = activation_case(loader, (16, 96, 57, 57), torch.float16, last, "silu", True)
        assert all(torch.equal(again[name], value) for name, value in first.items())


def test_nan_in_masked_planes_does_no_harm() -> None:
    x = torch.full((2, 4, 8, 8), float("nan"), device="cuda")
    x[:, 2] = 1
    mask = torch.tensor([0.0, 0, 1, 0], device="cuda")
    one, zero = torch.ones(4, device="cuda"), torch.zeros(4, device="cuda")
    assert float(masked_affine_act(x, mask, one, zero).sum()) == 128


def _cuda_arguments(dtype: torch.dtype, last: bool, activation: str = "silu") -> tuple[Any, ...]:
    t = tensors((2, 6, 3, 5), dtype, 0, channels_last=last)
    return (*(t[name].cuda().requires_grad_() for name in ("x", "mask", "scale", "shift", "residual")), activation)


@pytest.mark.parametrize(("dtype", "last"), itertools.product(DTYPES, (False, True)))
def test_opcheck(dtype: torch.dtype, last: bool) -> None:
    args = _cuda_arguments(dtype, last)
    torch.library.opcheck(torch.ops.passdeploy.masked_affine_act.default, args)
    images = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8, device="cuda")
    prompt = torch.randn(3, 8, 8, device="cuda", requires_grad=True)
    torch.library.opcheck(
        torch.ops.passdeploy.prompted_input.default,
        (images, SCALE.cuda(), SHIFT.cuda(), prompt, 8, 8, 1, dtype, last),
    )


@pytest.mark.parametrize("last", [False, True])
def test_gradcheck(last: bool) -> None:
    """In float32, which is what the kernels have: a coarse step and a coarse bound. float64 would run the reference."""
    *args, activation = _cuda_arguments(torch.float32, last)
    assert torch.autograd.gradcheck(
        lambda *a: masked_affine_act(*a, activation), args, eps=1e-2, atol=2e-2, rtol=2e-2, nondet_tol=0
    )


def test_compiles_in_one_graph() -> None:
    args = _cuda_arguments(torch.float32, False, "relu")

    def step(*a: Any) -> Tensor:
        return masked_affine_act(*a).square().mean()

    got = torch.autograd.grad(torch.compile(step, fullgraph=True)(*args), args[:5])
    for a, b in zip(got, torch.autograd.grad(step(*args), args[:5]), strict=True):
        assert difference(a, b) <= 1e-5


def test_streams_and_graphs() -> None:
    x = torch.randn(4, 8, 16, 16, device="cuda")
    one, zero = torch.ones(8, device="cuda"), torch.zeros(8, device="cuda")
    expected = masked_affine_act(x, one, 2 * one, zero)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        masked_affine_act(x, one, one, zero)
    torch.cuda.current_stream().wait_stream(side)
    scale = 2 * one
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = masked_affine_act(x, one, scale, zero)
    y.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, expected)


def test_the_kernel_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the reference, which would give the same numbers."""
    seen: list[str] = []
    original = driver.CudaBindings.launch
    monkeypatch.setattr(
        driver.CudaBindings,
        "launch",
        lambda self, launch, stream: (seen.append(launch.kernel), original(self, launch, stream))[1],
    )
    x = torch.randn(2, 3, 4, 4, device="cuda", requires_grad=True)
    one = torch.ones(3, device="cuda", requires_grad=True)
    masked_affine_act(x, one, one, one).sum().backward()
    stage_input(InputStage(Preprocess(size=(8, 8))).cuda(), torch.zeros(1, 8, 8, 3, dtype=torch.uint8, device="cuda"))
    assert seen == [
        "masked_affine_act_forward_nchw_f32", "masked_affine_act_backward_nchw_f32", "masked_affine_act_finish",
        "prompted_input_f32",
    ]  # fmt: skip


def test_code_compiled_at_run_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(build, "prebuilt", lambda _: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    activation_case(driver.CudaBindings(), (2, 5, 7, 7), torch.float16, False, "relu", True)
    assert list((tmp_path / "passdeploy" / "kernels").glob("*.cubin"))


@pytest.mark.skipif(build.nvcc_path() is None, reason="nvcc is not installed (CUDA toolkit)")
def test_code_compiled_ahead_of_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    build.build_fatbin("masked_affine_act", tmp_path / "fatbin", threads=8)
    monkeypatch.setattr(build, "prebuilt", lambda _: (tmp_path / "fatbin").read_bytes())
    monkeypatch.setattr(build, "compiled", lambda *_: pytest.fail("the fatbin was refused"))
    activation_case(driver.CudaBindings(), (2, 5, 7, 7), torch.float16, False, "relu", True)


def test_through_pycuda() -> None:
    try:
        loader = driver.Pycuda()
    except Unavailable as error:
        pytest.skip(str(error))
    import pycuda.autoprimaryctx  # noqa: F401

    activation_case(loader, (2, 5, 7, 7), torch.float16, False, "relu", True)
    input_case(loader, INPUTS[2], torch.float16, False)


@pytest.mark.parametrize("last", [False, True])
def test_cuda_array_interface(last: bool) -> None:
    images = torch.randint(0, 256, (2, 16, 24, 3), dtype=torch.uint8, device="cuda")
    prompt = torch.randn(3, 16, 24, device="cuda")
    shape = (2, 16, 24, 3) if last else (2, 3, 16, 24)
    out = torch.empty(shape, dtype=torch.float16, device="cuda")
    prompted_input_into(
        out, images, SCALE.cuda(), SHIFT.cuda(), prompt, border=3, channels_last=last,
        stream=torch.cuda.current_stream().cuda_stream,
    )  # fmt: skip
    expected = prompted_input(
        images, SCALE.cuda(), SHIFT.cuda(), prompt, (16, 24), border=3, dtype=torch.float16, channels_last=last
    )
    assert torch.equal(out.permute(0, 3, 1, 2) if last else out, expected)


def test_indices_at_their_limit() -> None:
    """2^31 - 1 elements is the most that the kernels take, and must not wrap round."""
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    x = torch.ones(1, 7, 1, 306783378, dtype=torch.float16, device="cuda")  # 2^31 - 2 elements
    assert masked_op.shape_of(x) is not None
    one, zero = torch.ones(7, device="cuda"), torch.zeros(7, device="cuda")
    y = masked_affine_act(x, one, torch.arange(7, device="cuda"), zero)
    for channel in range(7):
        assert bool((y[0, channel, 0, ::4099] == channel).all())
        assert float(y[0, channel, 0, -1]) == channel


def _sanitizer() -> str | None:
    beside_nvcc = str(Path(build.nvcc_path() or "nvcc").parent)
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=beside_nvcc)


@pytest.mark.skipif(_sanitizer() is None, reason="compute-sanitizer is not installed (CUDA toolkit)")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_compute_sanitizer(tool: str) -> None:
    # Without its cache PyTorch's every array is an allocation of its own, whose ends the sanitizer knows.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [str(_sanitizer()), "--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no"]
    command += [sys.executable, "-m", "tests.gpu.kernel_cases"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "all cases ran" in done.stdout
