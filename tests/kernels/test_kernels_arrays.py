"""Arrays that are no torch tensors: the CUDA array interface, with the emulator as the GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from passdeploy.errors import BadInput, Unavailable
from passdeploy.kernels import driver, prompted_input
from passdeploy.kernels.arrays import prompted_input_into, view
from tests.kernels.cases import difference
from tests.kernels.emulated import have_compiler
from tests.kernels.test_kernels_ops import Anywhere

needs_compiler = pytest.mark.skipif(not have_compiler(), reason="g++ is not installed; it stands in for the GPU")


class OnGpu:
    """What cupy, pycuda or numba would hand over; here the memory is numpy's."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        inner = array.__array_interface__
        self.__cuda_array_interface__ = {name: inner[name] for name in ("shape", "typestr", "data", "strides")}
        self.__cuda_array_interface__["version"] = 3


def given(**changes: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {
        "out": OnGpu(np.zeros((2, 3, 8, 8), np.float16)),
        "images": OnGpu(rng.integers(0, 256, (2, 8, 8, 3), np.uint8)),
        "scale": OnGpu(np.array([4, 5, 6], np.float32)),
        "shift": OnGpu(np.array([-1, -2, -3], np.float32)),
        "prompt": OnGpu(rng.normal(size=(3, 8, 8)).astype(np.float32)),
    }
    return {**arrays, **changes}


@needs_compiler
@pytest.mark.parametrize(("last", "bfloat16", "border"), [(False, False, 0), (True, False, 1), (False, True, 2)])
def test_writes_what_the_operator_returns(last: bool, bfloat16: bool, border: int) -> None:
    shape = (2, 8, 8, 3) if last else (2, 3, 8, 8)
    out = np.zeros(shape, np.uint16 if bfloat16 else np.float32)
    arrays = given(out=OnGpu(out))
    prompted_input_into(**arrays, border=border, channels_last=last, bfloat16=bfloat16, loader=Anywhere())
    tensors = {name: torch.from_numpy(a.array) for name, a in arrays.items() if name != "out"}
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    expected = prompted_input(**tensors, size=(8, 8), border=border, dtype=dtype)
    got = torch.from_numpy(out).view(dtype)
    got = got.permute(0, 3, 1, 2) if last else got
    assert difference(got, expected) <= (8e-3 if bfloat16 else 1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": np.zeros((2, 8, 8, 3), np.uint8)}, "images: ndarray does not offer the CUDA array interface"),
        ({"images": OnGpu(np.zeros((1, 8, 8, 3), np.uint8))}, r"images: must be u8 \(2, 8, 8, 3\)"),
        ({"images": OnGpu(np.zeros((2, 8, 8, 6), np.uint8)[..., ::2])}, "images: has gaps"),
        ({"scale": OnGpu(np.zeros(3))}, "scale: arrays of type <f8"),
        ({"out": OnGpu(np.zeros((2, 8, 8, 3), np.float16))}, r"out: must be a float array \(N, 3, H, W\)"),
        ({"border": 4}, "border 4: leaves nothing"),
    ],
)
def test_wrong_arrays_are_refused_in_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        prompted_input_into(**given(**change), loader=Anywhere())


def test_no_images_are_no_launch() -> None:
    """Nor is a device asked for, which empty arrays can't name: there need be none."""
    out, images = OnGpu(np.zeros((0, 3, 8, 8), np.float16)), OnGpu(np.zeros((0, 8, 8, 3), np.uint8))
    prompted_input_into(**given(out=out, images=images))
    with pytest.raises(BadInput, match="scale: must be f32"):
        prompted_input_into(**given(out=out, images=images, scale=OnGpu(np.zeros(4, np.float32))))


def test_strides_of_a_dense_array_are_accepted() -> None:
    array = OnGpu(np.zeros((2, 1, 4), np.float32))
    array.__cuda_array_interface__["strides"] = (16, 999, 4)  # of a dimension of 1: any
    assert view(array, "it").shape == (2, 1, 4)


@needs_compiler
def test_streams_on_which_arrays_are_in_use_are_waited_for() -> None:
    def awaited(stream: int, version: int = 3, **streams: int) -> list[int]:
        arrays, loader = given(), Anywhere()
        for name, array in arrays.items():
            array.__cuda_array_interface__["version"] = version
            if name in streams:
                array.__cuda_array_interface__["stream"] = streams[name]
        prompted_input_into(**arrays, stream=stream, loader=loader)
        return loader.awaited

    assert awaited(77) == [], "version 3 and no stream: nobody is writing"
    assert awaited(77, images=5, prompt=77) == [5]
    assert awaited(77, out=5) == [5], "whoever reads or writes it there must be done first"
    assert awaited(0, images=1) == [], "the default stream by its two names"
    assert awaited(77, version=2) == [1], "torch's say nothing of streams"


def test_without_a_gpu_the_message_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_driver(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(driver.ctypes, "CDLL", no_driver)
    driver.unavailable.cache_clear()
    driver.default_loader.cache_clear()
    try:
        with pytest.raises(Unavailable, match="no NVIDIA driver"):
            prompted_input_into(**given())
    finally:
        driver.unavailable.cache_clear()


def test_pycuda_is_asked_for_by_name_when_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pycuda", None)
    with pytest.raises(Unavailable, match="pycuda can't be imported"):
        driver.Pycuda()
