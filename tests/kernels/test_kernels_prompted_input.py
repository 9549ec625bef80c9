"""kernels/prompted_input.cu itself, run on the CPU, against the reference and the network's own input stage."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from passdeploy.data.base import Preprocess
from passdeploy.kernels import enqueue, prompted_input, stage_input
from passdeploy.kernels.dispatch import KINDS
from passdeploy.search.prompt import InputStage
from tests.kernels.cases import DTYPES, INPUT_TOLERANCE, INPUTS, difference
from tests.kernels.emulated import Emulated, guarded, have_compiler

needs_compiler = pytest.mark.skipif(not have_compiler(), reason="g++ is not installed; it stands in for the GPU")

SCALE = 1 / torch.tensor([0.229, 0.224, 0.225])
SHIFT = -torch.tensor([0.485, 0.456, 0.406]) * SCALE


def make(count: int, source: tuple[int, int], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(count + source[0] * 7 + source[1])
    images = torch.randint(0, 256, (count, *source, 3), dtype=torch.uint8, generator=g)
    return images, torch.randn(3, *size, generator=g)


def run(
    images: Tensor,
    prompt: Tensor | None,
    size: tuple[int, int],
    border: int,
    dtype: torch.dtype,
    last: bool,
    *,
    offset: int = 0,
    order: int = 0,
) -> tuple[Tensor, Emulated]:
    layout = torch.channels_last if last else torch.contiguous_format
    like = torch.empty(len(images), 3, *size, dtype=dtype).contiguous(memory_format=layout)
    if last:  # the layout of a tensor with one row or column is ambiguous
        like = torch.empty_strided(like.shape, (3 * size[0] * size[1], 1, 3 * size[1], 3), dtype=dtype)
    out = guarded(like, offset * like.element_size(), fill=0xCC)
    inputs = {"images": guarded(images, offset), "scale": guarded(SCALE), "shift": guarded(SHIFT)}
    if prompt is not None:
        inputs["prompt"] = guarded(prompt)
    loader = Emulated(order)
    with loader.arrays(**inputs, out=out):
        enqueue.input_stage(
            loader,
            0,
            enqueue.InputArrays(*(t.data_ptr() for t in inputs.values())),
            out.data_ptr(),
            count=len(images),
            source=(images.shape[1], images.shape[2]),
            size=size,
            border=border,
            channels_last=last,
            kind=KINDS[dtype],
        )
    assert (loader.writes("out") == 1).all()
    return out, loader


@needs_compiler
@pytest.mark.parametrize(("case", "dtype", "last"), itertools.product(INPUTS, DTYPES, [False, True]))
def test_matches_the_reference(
    case: tuple[int, tuple[int, int], tuple[int, int], int], dtype: torch.dtype, last: bool
) -> None:
    count, source, size, border = case
    images, prompt = make(count, source, size)
    for added in (prompt, None):
        out, _ = run(images, added, size, border, dtype, last)
        expected = prompted_input(images, SCALE, SHIFT, added, size, border=border, dtype=dtype, channels_last=last)
        assert difference(out, expected) <= INPUT_TOLERANCE[dtype]


@needs_compiler
@pytest.mark.parametrize(("dtype", "last", "offset"), itertools.product(DTYPES, [False, True], [1, 5]))
def test_any_alignment(dtype: torch.dtype, last: bool, offset: int) -> None:
    for source, size, border in (((9, 8), (9, 8), 0), ((16, 16), (16, 16), 2)):
        images, prompt = make(2, source, size)
        out, _ = run(images, prompt, size, border, dtype, last, offset=offset)
        expected = prompted_input(images, SCALE, SHIFT, prompt, size, border=border, dtype=dtype)
        assert difference(out, expected) <= INPUT_TOLERANCE[dtype]


@needs_compiler
def test_staged_rows_do_not_depend_on_the_order_of_threads() -> None:
    images, prompt = make(3, (24, 24), (24, 24))
    first, loader = run(images, prompt, (24, 24), 2, torch.float32, False)
    assert loader.launches[0].shared_bytes > 0
    for order in (1, 2, 3):
        assert torch.equal(first, run(images, prompt, (24, 24), 2, torch.float32, False, order=order)[0])


@needs_compiler
def test_a_block_goes_through_several_images() -> None:
    """More images than slices: shared memory is used again and again by the same block."""
    images, prompt = make(1100, (8, 8), (8, 8))
    out, loader = run(images, prompt, (8, 8), 1, torch.float16, False)
    assert loader.launches[0].grid[1] < len(images)
    expected = prompted_input(images, SCALE, SHIFT, prompt, (8, 8), border=1, dtype=torch.float16)
    assert difference(out, expected) <= INPUT_TOLERANCE[torch.float16]


@needs_compiler
def test_each_byte_of_an_image_is_read_once() -> None:
    images, prompt = make(2, (16, 16), (16, 16))
    _, loader = run(images, prompt, (16, 16), 0, torch.float16, False)
    assert (loader.reads("images") == 1).all()


@pytest.mark.parametrize(("kind", "width"), [("none", 0), ("additive", 0), ("additive", 3), ("expansive", 4)])
@pytest.mark.parametrize("last", [False, True])
def test_same_as_the_input_stage(kind: str, width: int, last: bool) -> None:
    stage = InputStage(Preprocess(size=(20, 28)), kind, width)
    if stage.prompt is not None:
        torch.nn.init.normal_(stage.prompt, generator=torch.Generator().manual_seed(0))
    images, _ = make(2, (20, 28), (20, 28))
    got = stage_input(stage, images, channels_last=last)
    expected = stage(images.permute(0, 3, 1, 2).float() / 255)
    assert difference(got, expected) <= 1e-6
    assert got.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
