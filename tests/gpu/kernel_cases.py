"""Runs the kernels' cases on a GPU and compares with the reference on the CPU. Also what compute-sanitizer is run on:

``compute-sanitizer python -m tests.gpu.kernel_cases``
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from passdeploy.kernels import enqueue, masked_op, reference
from passdeploy.kernels.dispatch import KINDS
from passdeploy.kernels.driver import CudaBindings
from passdeploy.kernels.enqueue import Loader
from passdeploy.kernels.geometry import ACTIVATIONS
from tests.kernels.cases import DTYPES, INPUT_TOLERANCE, INPUTS, SHAPES, TOLERANCE, difference, tensors
from tests.kernels.emulated import check_guards, guarded

NAMES = ("x", "mask", "scale", "shift", "residual")
SCALE = 1 / torch.tensor([0.229, 0.224, 0.225])
SHIFT = -torch.tensor([0.485, 0.456, 0.406]) * SCALE
# The GPU's exp, erf and division are approximations, and its sums have another order.
SLACK = 4


def activation_case(
    loader: Loader,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    last: bool,
    activation: str,
    residual: bool,
    offset: int = 0,
) -> dict[str, Tensor]:
    """Forward and backward on the GPU, checked against the CPU; returns what the GPU wrote."""
    host = tensors(shape, dtype, seed=sum(shape), channels_last=last)
    step = offset * host["x"].element_size()
    t = {name: guarded(value.cuda(), step if value.dim() > 1 else 0) for name, value in host.items()}
    seen = masked_op.shape_of(host["x"])
    assert seen is not None
    inputs = [t[name] for name in NAMES if residual or name != "residual"]
    arrays = enqueue.ActivationArrays(*(tensor.data_ptr() for tensor in inputs))
    y = guarded(t["x"], step, fill=0xCC)
    stream = torch.cuda.current_stream().cuda_stream
    enqueue.forward(loader, stream, seen, activation, arrays, y.data_ptr())
    out = {
        "x": guarded(t["x"], step, fill=0xCC),
        "residual": guarded(t["x"], fill=0xCC),
        **{name: guarded(t[name], fill=0xCC) for name in ("mask", "scale", "shift")},
    }
    partial = guarded(torch.empty(enqueue.partial_size(seen), device="cuda"), fill=0xFF)
    gradients = enqueue.Gradients(*(tensor.data_ptr() for tensor in (*out.values(), partial)))
    enqueue.backward(loader, stream, seen, activation, arrays, t["grad_y"].data_ptr(), gradients)
    torch.cuda.synchronize()
    for tensor in (*t.values(), y, *out.values(), partial):
        check_guards(tensor)

    args = (host["x"], host["mask"], host["scale"], host["shift"], host["residual"] if residual else None, activation)
    assert difference(y.cpu(), reference.forward(*args)) <= SLACK * TOLERANCE[dtype]
    grads = reference.backward(host["grad_y"], *args)
    for name, value in zip(("x", "mask", "scale", "shift", "residual"), grads, strict=True):
        bound = TOLERANCE[dtype] if name in ("x", "residual") else 1e-5
        assert difference(out[name].cpu(), value) <= SLACK * bound, (shape, dtype, last, activation, name)
    return {"y": y, **out}


def input_case(
    loader: Loader,
    case: tuple[int, tuple[int, int], tuple[int, int], int],
    dtype: torch.dtype,
    last: bool,
    offset: int = 0,
) -> None:
    """One `prompted_input` on the GPU, checked against the CPU."""
    count, source, size, border = case
    g = torch.Generator().manual_seed(count + source[0] * 7 + source[1])
    images = torch.randint(0, 256, (count, *source, 3), dtype=torch.uint8, generator=g)
    prompt = torch.randn(3, *size, generator=g)
    layout = torch.channels_last if last else torch.contiguous_format
    expected = reference.prompted_input(images, SCALE, SHIFT, prompt, size, border, dtype, last)
    inputs = [guarded(images.cuda(), offset), *(guarded(t.cuda()) for t in (SCALE, SHIFT, prompt))]
    like = torch.empty(expected.shape, dtype=dtype, device="cuda", memory_format=layout)
    out = guarded(like, offset * like.element_size(), fill=0xCC)
    enqueue.input_stage(
        loader, torch.cuda.current_stream().cuda_stream, enqueue.InputArrays(*(t.data_ptr() for t in inputs)),
        out.data_ptr(), count=count, source=source, size=size, border=border, channels_last=last, kind=KINDS[dtype],
    )  # fmt: skip
    torch.cuda.synchronize()
    for tensor in (*inputs, out):
        check_guards(tensor)
    assert difference(out.cpu(), expected) <= SLACK * INPUT_TOLERANCE[dtype]


def layouts(shape: tuple[int, ...]) -> tuple[bool, ...]:
    return (False, True) if len(shape) == 4 else (False,)


def main() -> None:
    loader = CudaBindings()
    torch.zeros(1, device="cuda")  # makes PyTorch's context the current one
    for (number, shape), dtype in itertools.product(enumerate(SHAPES), DTYPES):
        for last in layouts(shape):
            activation = ACTIVATIONS[number % len(ACTIVATIONS)]
            activation_case(loader, shape, dtype, last, activation, residual=number % 2 == 0, offset=number % 3)
    for case, dtype, last in itertools.product(INPUTS, DTYPES, (False, True)):
        input_case(loader, case, dtype, last, offset=len(case) % 3)
    print("all cases ran")


if __name__ == "__main__":
    main()
