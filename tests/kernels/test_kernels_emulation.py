"""The emulator finds what it is there to find: each kernel of broken.cu has one mistake."""

from __future__ import annotations

import ctypes

import pytest
import torch

from tests.kernels.emulated import HERE, guarded, have_compiler, library

pytestmark = pytest.mark.skipif(not have_compiler(), reason="g++ is not installed; it stands in for the GPU")


class Params(ctypes.Structure):
    _fields_ = (("source", ctypes.c_uint64), ("out", ctypes.c_uint64), ("number", ctypes.c_int))


def run(kernel: str, order: int = 0) -> tuple[str, torch.Tensor]:
    lib = library(HERE / "broken.cu", "BrokenParams")
    source, out = guarded(torch.arange(64.0)), guarded(torch.zeros(64))
    lib.clear_regions()
    for tensor in (source, out):
        lib.add_region(tensor.data_ptr(), 256)
    params = Params(source.data_ptr(), out.data_ptr(), 0)
    address = ctypes.cast(getattr(lib, kernel), ctypes.c_void_p)
    failed = lib.emulate(address, ctypes.byref(params), 1, 1, 1, 64, 256, order)
    return (lib.last_error().decode() if failed else ""), out.clone()


@pytest.mark.parametrize("order", [0, 1, 2])
def test_barriers_and_shuffles(order: int) -> None:
    error, out = run("sound", order)
    assert error == ""
    values = torch.arange(64.0).flip(0)
    assert float(out[0]) == float(values[:32].sum())
    assert float(out[32]) == float(values[32:].sum())


@pytest.mark.parametrize(
    ("kernel", "finding"),
    [
        ("divergent_barrier", "not all threads reach"),
        ("divergent_shuffle", "not all threads reach"),
        ("reads_too_far", "outside every array"),
        ("writes_too_far", "outside every array"),
        ("writes_twice", "written twice"),
        ("misaligned_packet", "not aligned"),
        ("too_much_shared", "beyond what the launch asked for"),
        ("undefined_shift", "undefined behaviour"),
    ],
)
def test_mistakes_are_found(kernel: str, finding: str) -> None:
    error, _ = run(kernel)
    assert finding in error
    assert run("sound")[0] == ""  # and the next launch is clean again


def test_a_missing_barrier_shows_in_the_result() -> None:
    (_, rising), (_, falling) = run("missing_barrier", 0), run("missing_barrier", 1)
    assert not torch.equal(rising, falling)
