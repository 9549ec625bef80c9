"""The torch operators: autograd, fake tensors, compilation; and their CUDA path with the emulator as the GPU."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from passdeploy.data.base import Preprocess
from passdeploy.errors import BadInput
from passdeploy.kernels import (
    batch_norm_affine,
    input_op,
    masked_affine_act,
    masked_op,
    prompted_input,
    reference,
    stage_input,
)
from passdeploy.kernels.geometry import ACTIVATIONS
from passdeploy.search.prompt import InputStage
from tests.kernels.cases import DTYPES, KINKS, TOLERANCE, difference, tensors
from tests.kernels.emulated import Anywhere, have_compiler

needs_compiler = pytest.mark.skipif(not have_compiler(), reason="g++ is not installed; it stands in for the GPU")


def arguments(
    activation: str, residual: bool, *, dtype: torch.dtype = torch.float32, last: bool = False
) -> tuple[Any, ...]:
    t = tensors((2, 6, 3, 5), dtype, 0, channels_last=last)
    values = [t[name].requires_grad_() for name in ("x", "mask", "scale", "shift")]
    return (*values, t["residual"].requires_grad_() if residual else None, activation)


def plain(x: Tensor, mask: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    """The same from PyTorch's own differentiable operators."""
    c = (slice(None), None, None)
    z = x * (mask * scale)[c] + shift[c]
    z = z if residual is None else z + residual
    return z if activation == "none" else getattr(nn.functional, activation)(z)


@pytest.mark.parametrize(("activation", "residual"), itertools.product(ACTIVATIONS, [False, True]))
def test_value_and_gradients(activation: str, residual: bool) -> None:
    args = arguments(activation, residual)
    wanted = [a for a in args if isinstance(a, Tensor)]
    weight = torch.randn(args[0].shape, generator=torch.Generator().manual_seed(1))
    y, expected = masked_affine_act(*args), plain(*args)
    assert difference(y, expected) <= 2e-6
    got = torch.autograd.grad((y * weight).sum(), wanted)
    for a, b in zip(got, torch.autograd.grad((expected * weight).sum(), wanted), strict=True):
        assert difference(a, b) <= 1e-5


@pytest.mark.parametrize("activation", KINKS)
def test_slopes_at_the_kinks_are_pytorchs(activation: str) -> None:
    z = torch.tensor(KINKS[activation], requires_grad=True)
    zeros = torch.zeros(len(z))
    (got,) = torch.autograd.grad(masked_affine_act(torch.ones(1, len(z)), zeros, zeros, z, None, activation).sum(), z)
    (expected,) = torch.autograd.grad(getattr(nn.functional, activation)(z).sum(), z)
    assert torch.equal(got, expected)


def test_a_second_derivative_is_refused() -> None:
    """Left out, it would be taken for zero."""
    args = arguments("silu", True)
    first = torch.autograd.grad(masked_affine_act(*args).square().sum(), args[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="no autograd formula"):
        first.sum().backward()


@pytest.mark.parametrize("activation", ["none", "silu", "gelu"])
def test_gradcheck(activation: str) -> None:
    args = [a.detach().double().requires_grad_() if isinstance(a, Tensor) else a for a in arguments(activation, True)]
    assert torch.autograd.gradcheck(lambda *a: masked_affine_act(*a, activation), args[:-1])


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("dtype", "residual"), [(torch.float32, True), (torch.float16, False)])
def test_opcheck_masked_affine_act(last: bool, dtype: torch.dtype, residual: bool) -> None:
    args = arguments("relu", residual, dtype=dtype, last=last)
    torch.library.opcheck(torch.ops.passdeploy.masked_affine_act.default, args)
    detached = [a.detach() if isinstance(a, Tensor) else a for a in args]
    torch.library.opcheck(
        torch.ops.passdeploy.masked_affine_act_backward.default,
        (torch.ones_like(detached[0]), *detached, True, True, residual),
    )


@pytest.mark.parametrize(("prompt", "last"), [(True, False), (True, True), (False, False)])
def test_opcheck_prompted_input(prompt: bool, last: bool) -> None:
    images = torch.randint(0, 256, (2, 6, 8, 3), dtype=torch.uint8)
    border = torch.randn(3, 8, 8, requires_grad=True) if prompt else None
    args = (images, torch.ones(3), torch.zeros(3), border, 8, 8, 1, torch.float16, last)
    torch.library.opcheck(torch.ops.passdeploy.prompted_input.default, args)


def test_compiles_in_one_graph() -> None:
    args = arguments("relu", True)

    def step(*a: Any) -> Tensor:
        return masked_affine_act(*a).square().mean()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    wanted = args[:5]
    got = torch.autograd.grad(compiled(*args), wanted)
    for a, b in zip(got, torch.autograd.grad(step(*args), wanted), strict=True):
        assert torch.equal(a, b)


def test_input_compiles_in_one_graph() -> None:
    stage = InputStage(Preprocess(size=(8, 8)), "expansive", 1)
    images = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
    compiled = torch.compile(lambda i: stage_input(stage, i), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(images), stage_input(stage, images))


def test_gradient_of_the_prompt() -> None:
    stage = InputStage(Preprocess(size=(10, 12)), "expansive", 2)
    images = torch.randint(0, 256, (3, 10, 12, 3), dtype=torch.uint8)
    weight = torch.randn(3, 3, 10, 12)
    assert stage.prompt is not None
    (got,) = torch.autograd.grad((stage_input(stage, images) * weight).sum(), stage.prompt)
    float_images = images.permute(0, 3, 1, 2).float() / 255
    (expected,) = torch.autograd.grad((stage(float_images) * weight).sum(), stage.prompt)
    assert difference(got, expected) <= 1e-6


def test_batch_norm_as_scale_and_shift() -> None:
    norm = nn.BatchNorm2d(6).train()
    x = torch.randn(4, 6, 3, 5)
    norm(x)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    mask = torch.tensor([1.0, 0, 1, 1, 0, 1])
    scale, shift = batch_norm_affine(norm.eval())
    got = masked_affine_act(x, mask, scale, mask * shift, None, "relu")
    assert difference(got, torch.relu(norm(x)) * mask[:, None, None]) <= 2e-6
    with pytest.raises(BadInput, match="running statistics"):
        batch_norm_affine(nn.BatchNorm2d(6, track_running_stats=False))


def test_masks_of_units() -> None:
    """A unit of two channels: its gradient is the sum of theirs."""
    args = arguments("relu", False)
    unit = torch.tensor([1.0, 0.0, 1.0], requires_grad=True)
    of = torch.tensor([0, 1, 2, 0, 1, 2])
    masked_affine_act(args[0], unit[of], *args[2:]).sum().backward()
    per_channel = unit.detach()[of].requires_grad_()
    masked_affine_act(args[0], per_channel, *args[2:]).sum().backward()
    assert unit.grad is not None and per_channel.grad is not None
    assert difference(unit.grad, per_channel.grad.view(2, 3).sum(0)) <= 1e-6


@needs_compiler
@pytest.mark.parametrize(("dtype", "last", "residual"), itertools.product(DTYPES, [False, True], [False, True]))
def test_the_cuda_path_with_the_emulator(dtype: torch.dtype, last: bool, residual: bool) -> None:
    """All of the operator's CUDA implementation but the driver: layouts, copies, scratch, addresses."""
    args = [a.detach() if isinstance(a, Tensor) else a for a in arguments("silu", residual, dtype=dtype, last=last)]
    # Neither the gradient nor the residual comes in x's layout.
    grad_y = torch.randn(5, 3, 6, 2).to(dtype).permute(3, 2, 1, 0)
    if residual:
        args[4] = args[4].contiguous(memory_format=torch.contiguous_format if last else torch.channels_last)
    loader, shape = Anywhere(), masked_op.shape_of(args[0])
    assert shape is not None and shape.channels_last == last
    y = masked_op.forward_on(loader, shape, *args)
    expected = reference.forward(*args)
    assert y.stride() == expected.stride() and difference(y, expected) <= TOLERANCE[dtype]
    for wants in itertools.product([False, True], repeat=3):
        got = masked_op.backward_on(loader, shape, grad_y, *args, *wants)
        full = reference.backward(grad_y, *args)
        for value, complete, want in zip(got, full, (wants[0], *[wants[1]] * 3, wants[2]), strict=True):
            assert value.numel() == (complete.numel() if want else 0)
            if want:
                assert difference(value, complete) <= max(TOLERANCE[dtype], 1e-5)


@needs_compiler
def test_the_cuda_path_of_the_input_with_the_emulator() -> None:
    images = torch.randint(0, 256, (2, 9, 3, 8), dtype=torch.uint8).permute(0, 1, 3, 2)
    prompt = torch.randn(3, 8, 9).transpose(1, 2)
    args = (images, torch.full((3,), 2.0), torch.ones(3), prompt)
    got = input_op.input_on(Anywhere(), *args, (9, 8), 1, torch.float16, True)
    expected = prompted_input(*args, (9, 8), border=1, dtype=torch.float16, channels_last=True)
    assert got.stride() == expected.stride() and difference(got, expected) <= TOLERANCE[torch.float16]


def test_what_was_cast_is_not_read_as_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the operators themselves, as an exported program calls them: a kernel would read past the end."""
    monkeypatch.setattr(masked_op.dispatch, "loader", lambda device: Anywhere())
    monkeypatch.setattr(torch.cuda, "device", lambda device: pytest.fail("the kernel was used"))
    x, *channels = (a.detach() for a in arguments("relu", False)[:4])
    halves = [values.half() for values in channels]
    args = (x, *halves, None, "relu")
    assert torch.equal(masked_op._forward_cuda(*args), reference.forward(*args))
    got = masked_op._backward_cuda(torch.ones_like(x), *args, True, True, False)
    for value, expected in zip(got[:4], reference.backward(torch.ones_like(x), *args), strict=False):
        assert torch.equal(value, expected) and value.dtype == expected.dtype
    images = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
    colours = (torch.full((3,), 0.5).half(), torch.ones(3), None)
    rest = (torch.float32, False)
    got_input = input_op._input_cuda(images, *colours, 8, 8, 0, *rest)
    assert torch.equal(got_input, reference.prompted_input(images, *colours, (8, 8), 0, *rest))


def test_what_the_kernels_take() -> None:
    def kind(*shape: int, **options: Any) -> Any:
        return masked_op.shape_of(torch.empty(*shape, **options))

    assert kind(2, 3, 4, 4).plane == 16
    assert kind(2, 3).channels_last and kind(2, 3, 1, 1).images == 2
    assert kind(0, 3, 4, 4) is None
    assert kind(2, 3, dtype=torch.float64) is None
    assert kind(2**11, 2**10, 32, 32, device="meta") is None  # 2^31 elements: the reference's
    assert kind(2**11, 2**10, 32, 31, device="meta") is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "rleu"}, "did you mean relu"),
        ({"mask": torch.ones(5)}, r"mask: must have one value per channel, \(6,\)"),
        ({"residual": torch.ones(2, 6, 3, 4)}, "residual: must be like x"),
        ({"mask": torch.ones(6, device="meta")}, "mask: lies on meta, x on cpu"),
        ({"residual": torch.ones(2, 6, 3, 5, device="meta")}, "residual: must be like x.* on cpu"),
        ({"x": torch.ones(6)}, "x: must be a float tensor"),
        ({"x": torch.ones(2, 6, dtype=torch.int32)}, "x: must be a float tensor"),
    ],
)
def test_wrong_use_is_refused_in_one_line(change: dict[str, Any], message: str) -> None:
    names = ("x", "mask", "scale", "shift", "residual", "activation")
    given = {**dict(zip(names, arguments("relu", False), strict=True)), **change}
    with pytest.raises(BadInput, match=message):
        masked_affine_act(**given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(1, 8, 8, 3)}, "uint8"),
        ({"images": torch.zeros(1, 3, 8, 8, dtype=torch.uint8)}, "uint8"),
        ({"border": 4}, "leaves nothing"),
        ({"prompt": torch.zeros(3, 4, 4)}, r"prompt: must be \(3, 8, 8\)"),
        ({"scale": torch.ones(3, requires_grad=True)}, "no gradient"),
        ({"shift": torch.ones(3, device="meta")}, "shift: lies on meta, the images on cpu"),
        ({"scale": torch.ones(1)}, r"scale: must have one value per colour, \(3,\), not \(1,\)"),
    ],
)
def test_wrong_input_is_refused_in_one_line(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "images": torch.zeros(1, 8, 8, 3, dtype=torch.uint8), "scale": torch.ones(3), "shift": torch.zeros(3),
        "prompt": None, "size": (8, 8), "border": 0,
    }  # fmt: skip
    with pytest.raises(BadInput, match=message):
        prompted_input(**{**given, **change})
    stage = InputStage(Preprocess(size=(8, 8)))
    with pytest.raises(BadInput, match="8x8 pixels"):
        stage_input(stage, torch.zeros(1, 8, 9, 3, dtype=torch.uint8))


def test_empty_batches() -> None:
    assert masked_affine_act(torch.empty(0, 3, 2, 2), *[torch.ones(3)] * 3).shape == (0, 3, 2, 2)
    assert prompted_input(
        torch.empty(0, 8, 8, 3, dtype=torch.uint8), torch.ones(3), torch.zeros(3), None, (8, 8)
    ).shape == (0, 3, 8, 8)
