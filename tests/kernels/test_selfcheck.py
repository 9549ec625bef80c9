"""The kernel is used on a GPU as long as it does what the reference does; the emulator stands in for the GPU."""

from __future__ import annotations

import ctypes
import logging
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from passdeploy.errors import PassdeployError
from passdeploy.groups import Masker
from passdeploy.kernels import driver, masked_forward, masked_op, reference, selfcheck
from passdeploy.kernels.geometry import ACTIVATIONS, Launch
from passdeploy.kernels.masked_forward import SWITCH, KernelMasker, uses_kernel
from passdeploy.surgery import relative_difference
from tests.kernels.emulated import Anywhere, have_compiler
from tests.kernels.test_masked_forward import SIZE, prompted, soft

needs_compiler = pytest.mark.skipif(not have_compiler(), reason="g++ is not installed; it stands in for the GPU")
X = torch.zeros(3, 6, 5, 7)


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    selfcheck.reset()
    yield
    selfcheck.reset()


@needs_compiler
@pytest.mark.parametrize("dtype", selfcheck.BOUNDS)
@pytest.mark.parametrize("last", [False, True])
def test_the_kernel_passes(dtype: torch.dtype, last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selfcheck, "_CHUNK", 2 * X[0].numel())  # the reference in two parts, the last one shorter
    x = X.to(dtype, memory_format=torch.channels_last if last else torch.contiguous_format)
    state = torch.get_rng_state()
    for activation in ACTIVATIONS:
        assert selfcheck.complaint(x, activation, selfcheck._Run(Anywhere())) is None
    assert torch.equal(torch.get_rng_state(), state), "a search with the check must draw the numbers of one without"


class Faulty(Anywhere):
    """Spoils what a launch wrote, or does not launch at all."""

    def __init__(self, kernel: str, spoil: Callable[[Launch, int], None]) -> None:
        super().__init__()
        self.kernel, self.spoil = kernel, spoil

    def launch(self, launch: Launch, stream: int) -> None:
        super().launch(launch, stream)
        if self.kernel in launch.kernel:
            self.spoil(launch, len(self.launches))


def _add(field: str, amount: float, only_later: bool = False) -> Callable[[Launch, int], None]:
    """Changes the first value of an array that a launch wrote."""

    def spoil(launch: Launch, count: int) -> None:
        address = getattr(launch.params, field)
        if address and not (only_later and count <= 4):
            ctypes.cast(address, ctypes.POINTER(ctypes.c_float))[0] += amount

    return spoil


def _refuse(launch: Launch, count: int) -> None:
    raise PassdeployError("CUDA driver: CUDA_ERROR_NO_BINARY_FOR_GPU\nand more")


@needs_compiler
@pytest.mark.parametrize(
    ("kernel", "spoil", "told"),
    [
        ("forward", _add("y", 1.0), "its output is off by"),
        ("forward", _add("y", float("nan")), "two runs on the same input differ"),
        ("backward", _add("grad_x", 1.0), "its gradient is off by"),
        ("finish", _add("grad_mask", 1.0), "its mask's gradient is off by"),
        ("forward", _add("y", 1e-3, only_later=True), "two runs on the same input differ"),
        ("forward", _refuse, "CUDA_ERROR_NO_BINARY_FOR_GPU"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(kernel: str, spoil: Any, told: str) -> None:
    found = selfcheck.complaint(X, "relu", selfcheck._Run(Faulty(kernel, spoil)))
    assert found is not None and "\n" not in found
    assert found.startswith("relu on (3, 6, 5, 7) float32: ")
    assert told in found


@pytest.mark.parametrize("fits", [1, 0])
def test_where_memory_runs_out_fewer_images_are_checked_in_the_room_of_all(fits: int) -> None:
    """What the attempt before had allocated is free by then."""
    tried: list[int] = []
    made: list[weakref.ref[Tensor]] = []

    def run(x: Tensor, grad_y: Tensor, mask: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
        tried.append(len(x))
        if tried.count(len(x)) == 1:
            assert not [ref for ref in made if ref() is not None], "still held"
        made.extend(weakref.ref(tensor) for tensor in (x, grad_y))
        if len(x) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nand more")
        ones, zeros = torch.ones_like(mask), torch.zeros_like(mask)
        grads = reference.backward(grad_y, x, mask, ones, zeros, None, activation)
        sums = masked_op.mask_gradient(grad_y, x, ones, zeros, activation, reference.forward, reference.backward)
        return reference.forward(x, mask, ones, zeros, None, activation), grads[0], sums

    told = selfcheck.complaint(X.repeat(3, 1, 1, 1), "relu", run)  # type: ignore[arg-type]
    if fits:
        assert (told, tried) == (None, [9, 3, 1, 1])
    else:
        assert told == "relu on (1, 6, 5, 7) float32: CUDA out of memory. Tried to allocate 2.00 GiB"


def test_without_a_driver_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "unavailable", lambda: "cuda-bindings is not installed")
    assert selfcheck.complaint(X, "relu") == "cuda-bindings is not installed"
    assert selfcheck.complaint(X.double(), "relu") is None, "float64 is the reference's anyway"


def test_one_answer_per_shape_and_one_line_for_all(caplog: pytest.LogCaptureFixture) -> None:
    asked: list[tuple[Any, ...]] = []

    def check(x: Tensor, activation: str) -> str | None:
        asked.append((tuple(x.shape), activation))
        return "wrong" if activation == "silu" else None

    with caplog.at_level(logging.WARNING):
        assert all(selfcheck.trusted(x, "relu", check) for x in (X, X, X[:1], X))
        assert asked == [((3, 6, 5, 7), "relu"), ((1, 6, 5, 7), "relu")]
        assert selfcheck.trusted(X.contiguous(memory_format=torch.channels_last), "relu", check), "another kernel"
        assert len(asked) == 3
        assert not selfcheck.trusted(X, "silu", check)
        assert not selfcheck.trusted(X, "relu", check), "one wrong answer is enough"
        assert len(asked) == 4
    assert [r.getMessage() for r in caplog.records] == ["passdeploy: the search does without its CUDA kernel: wrong"]
    assert selfcheck.refused(X.device) == "wrong"
    assert selfcheck.refused(torch.device("meta")) is None


def test_a_refused_kernel_leaves_an_ordinary_masker(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the very step in which it is refused, and afterwards."""
    model, groups = prompted("resnet20")
    model.eval()
    images = torch.rand(2, 3, SIZE, SIZE)
    masks = soft(groups)
    expected = Masker(model, groups, "network.")(masks, images)
    wanted = torch.cat(torch.autograd.grad(expected.square().sum(), list(masks.values())))
    masker = KernelMasker(model, groups, "network.")
    monkeypatch.setattr(selfcheck, "_nothing", lambda x, activation: "wrong")
    monkeypatch.setattr(masked_forward.masked_op, "_forward", lambda *_: pytest.fail("the kernel was used"))
    for _ in range(2):
        masks = soft(groups)
        logits = masker(masks, images)
        assert relative_difference(expected, logits) <= 1e-5
        gradients = torch.cat(torch.autograd.grad(logits.square().sum(), list(masks.values())))
        assert relative_difference(wanted, gradients) <= 1e-4
    assert masker._scaled is masker._everything


def test_on_cuda_the_kernel_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SWITCH, raising=False)
    first, second, cpu = torch.device("cuda:0"), torch.device("cuda:1"), torch.device("cpu")
    assert uses_kernel(first) and not uses_kernel(cpu)
    selfcheck.refuse(first, "wrong")
    assert not uses_kernel(first) and uses_kernel(second)
    monkeypatch.setenv(SWITCH, "0")
    assert not uses_kernel(second)
    monkeypatch.setenv(SWITCH, "1")
    assert uses_kernel(second) and not uses_kernel(first), "what is wrong is not forced"
