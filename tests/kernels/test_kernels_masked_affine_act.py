"""kernels/masked_affine_act.cu itself, run on the CPU, against the reference."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from passdeploy.kernels import enqueue, masked_op, reference
from passdeploy.kernels.geometry import ACTIVATIONS
from tests.kernels.cases import DTYPES, KINKS, SHAPES, TOLERANCE, difference, tensors
from tests.kernels.emulated import Emulated, guarded, have_compiler

pytestmark = pytest.mark.skipif(not have_compiler(), reason="g++ is not installed; it stands in for the GPU")

LAYOUTS = [False, True]
ALL = [
    (shape, dtype, last)
    for shape, dtype, last in itertools.product(SHAPES, DTYPES, LAYOUTS)
    if not last or len(shape) == 4
]
NAMES = ("x", "mask", "scale", "shift", "residual")


def case(shape: tuple[int, ...], dtype: torch.dtype, last: bool, offset: int = 0) -> dict[str, Tensor]:
    made = tensors(shape, dtype, seed=sum(shape), channels_last=last)
    return {name: guarded(t, offset if t.dim() > 1 else 0) for name, t in made.items()}


def run_forward(loader: Emulated, t: dict[str, Tensor], activation: str, residual: bool, offset: int = 0) -> Tensor:
    shape = masked_op.shape_of(t["x"])
    assert shape is not None
    y = guarded(t["x"], offset, fill=0xCC)
    inputs = {name: t[name] for name in NAMES if residual or name != "residual"}
    arrays = enqueue.ActivationArrays(*(tensor.data_ptr() for tensor in inputs.values()))
    with loader.arrays(**inputs, y=y):
        enqueue.forward(loader, 0, shape, activation, arrays, y.data_ptr())
    assert (loader.writes("y") == 1).all()
    return y


def run_backward(loader: Emulated, t: dict[str, Tensor], activation: str, residual: bool) -> dict[str, Tensor]:
    shape = masked_op.shape_of(t["x"])
    assert shape is not None
    out = {
        "grad_x": guarded(t["x"], fill=0xCC),
        "grad_residual": guarded(t["x"], fill=0xCC),
        **{f"grad_{name}": guarded(t[name], fill=0xCC) for name in ("mask", "scale", "shift")},
    }
    partial = guarded(torch.empty(enqueue.partial_size(shape)), fill=0xFF)
    inputs = {name: t[name] for name in NAMES if residual or name != "residual"}
    arrays = enqueue.ActivationArrays(*(tensor.data_ptr() for tensor in inputs.values()))
    gradients = enqueue.Gradients(*(tensor.data_ptr() for tensor in (*out.values(), partial)))
    with loader.arrays(**inputs, grad_y=t["grad_y"], **out, partial=partial):
        enqueue.backward(loader, 0, shape, activation, arrays, t["grad_y"].data_ptr(), gradients)
    return out


@pytest.mark.parametrize(("shape", "dtype", "last"), ALL)
def test_forward_matches_the_reference(shape: tuple[int, ...], dtype: torch.dtype, last: bool) -> None:
    t = case(shape, dtype, last)
    for activation, residual in zip(ACTIVATIONS, itertools.cycle([False, True]), strict=False):
        y = run_forward(Emulated(), t, activation, residual)
        expected = reference.forward(
            t["x"], t["mask"], t["scale"], t["shift"], t["residual"] if residual else None, activation
        )
        assert difference(y, expected) <= TOLERANCE[dtype], (activation, residual)


@pytest.mark.parametrize(("shape", "dtype", "last"), ALL)
def test_backward_matches_the_reference(shape: tuple[int, ...], dtype: torch.dtype, last: bool) -> None:
    t = case(shape, dtype, last)
    # A block per channel: where there are many, two activations will do.
    activations = ACTIVATIONS[1:3] if shape[1] > 100 else ACTIVATIONS
    for activation, residual in zip(activations, itertools.cycle([True, False]), strict=False):
        got = run_backward(Emulated(), t, activation, residual)
        expected = reference.backward(
            t["grad_y"], t["x"], t["mask"], t["scale"], t["shift"], t["residual"] if residual else None, activation
        )
        for name, value in zip(("x", "mask", "scale", "shift", "residual"), expected, strict=True):
            # Sums over pixels are in float32 on both sides, in another order.
            bound = TOLERANCE[dtype] if name in ("x", "residual") else 1e-5
            assert difference(got[f"grad_{name}"], value) <= bound, (activation, residual, name)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("last", LAYOUTS)
def test_every_activation_with_and_without_residual(activation: str, residual: bool, last: bool) -> None:
    t = case((2, 6, 3, 5), torch.float32, last)
    added = t["residual"] if residual else None
    y = run_forward(Emulated(), t, activation, residual)
    assert difference(y, reference.forward(t["x"], t["mask"], t["scale"], t["shift"], added, activation)) <= 2e-6
    got = run_backward(Emulated(), t, activation, residual)
    expected = reference.backward(t["grad_y"], t["x"], t["mask"], t["scale"], t["shift"], added, activation)
    for name, value in zip(("x", "mask", "scale", "shift", "residual"), expected, strict=True):
        assert difference(got[f"grad_{name}"], value) <= 1e-5, name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("last", LAYOUTS)
@pytest.mark.parametrize("elements_off", [1, 3])
def test_any_alignment(dtype: torch.dtype, last: bool, elements_off: int) -> None:
    offset = elements_off * torch.empty((), dtype=dtype).element_size()
    t = case((2, 5, 3, 7), dtype, last, offset)
    t["residual"] = guarded(t["residual"], 0)  # arrays need not be off by the same
    y = run_forward(Emulated(), t, "relu", True, offset)
    expected = reference.forward(t["x"], t["mask"], t["scale"], t["shift"], t["residual"], "relu")
    assert difference(y, expected) <= TOLERANCE[dtype]
    got = run_backward(Emulated(), t, "relu", True)
    grads = reference.backward(t["grad_y"], t["x"], t["mask"], t["scale"], t["shift"], t["residual"], "relu")
    assert difference(got["grad_x"], grads[0]) <= TOLERANCE[dtype]
    assert difference(got["grad_mask"], grads[1]) <= 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_planes_are_not_read_in_nchw(dtype: torch.dtype) -> None:
    t = case((2, 6, 8, 8), dtype, False)
    t["mask"].copy_(torch.tensor([0.0, 1.0, 0.0, 0.0, 0.5, 1.0]))
    masked = t["mask"] == 0
    t["x"][:, masked] = float("nan")
    loader = Emulated()
    y = run_forward(loader, t, "relu", False)
    reads = torch.from_numpy(loader.reads("x")).view(2, 6, -1)
    assert bool((reads[:, masked] == 0).all())
    assert bool((reads[:, ~masked] == 1).all())
    assert bool(torch.isfinite(y).all())


@pytest.mark.parametrize("last", LAYOUTS)
def test_nan_where_the_mask_is_zero_does_no_harm(last: bool) -> None:
    t = case((2, 5, 3, 3), torch.float16, last)
    t["mask"].copy_(torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0]))
    t["x"][:, t["mask"] == 0] = float("nan")
    y = run_forward(Emulated(), t, "none", False)
    assert bool(torch.isfinite(y).all())
    assert torch.equal(y[:, 0], t["shift"][0].half().expand(2, 3, 3))
    got = run_backward(Emulated(), t, "none", False)
    assert bool(torch.isfinite(got["grad_x"]).all())
    assert bool(torch.isfinite(got["grad_scale"]).all())


def test_full_packets_are_read_and_written_at_once() -> None:
    """Aligned arrays are touched in 128-bit accesses: a plane of 64 floats is 16 of them, whatever it holds."""
    t = case((1, 2, 8, 8), torch.float32, False)
    t["mask"].fill_(1)
    loader = Emulated()
    run_forward(loader, t, "none", True)
    assert (loader.reads("x") == 1).all()
    assert (loader.reads("residual") == 1).all()


@pytest.mark.parametrize("last", LAYOUTS)
def test_the_order_of_threads_does_not_matter(last: bool) -> None:
    """A missing barrier would show: the sums must be the same bits whichever thread comes first."""
    t = case((3, 20, 9, 9), torch.float32, last)
    first = run_backward(Emulated(0), t, "silu", True)
    for order in (1, 2, 3):
        other = run_backward(Emulated(order), t, "silu", True)
        for name, value in first.items():
            assert torch.equal(value, other[name]), (order, name)


@pytest.mark.parametrize("last", LAYOUTS)
def test_gradient_of_masked_channels(last: bool) -> None:
    """What keeping a masked channel would change, to first order: not zero, and equal to a finite difference."""
    t = case((2, 4, 5, 3), torch.float32, last)
    t["mask"].copy_(torch.tensor([0.0, 1.0, 0.0, 1.0]))
    got = run_backward(Emulated(), t, "silu", False)["grad_mask"].double()
    wide = {name: value.double() for name, value in t.items()}

    def objective(mask: Tensor) -> Tensor:
        return (reference.forward(wide["x"], mask, wide["scale"], wide["shift"], None, "silu") * wide["grad_y"]).sum()

    for channel in range(4):
        step = torch.zeros(4, dtype=torch.float64)
        step[channel] = 1e-6
        slope = (objective(wide["mask"] + step) - objective(wide["mask"] - step)) / 2e-6
        assert abs(float(slope - got[channel])) <= 1e-4 * max(1.0, abs(float(slope)))
    assert float(got[0].abs()) > 1e-3


@pytest.mark.parametrize(("activation", "last"), itertools.product(KINKS, LAYOUTS))
def test_slopes_at_the_kinks_are_the_references(activation: str, last: bool) -> None:
    z = torch.tensor(KINKS[activation])
    t = case((2, len(z), 3, 5), torch.float32, last)
    t["mask"].zero_()
    t["shift"].copy_(z)
    got = run_backward(Emulated(), t, activation, False)["grad_residual"]
    expected = reference.backward(t["grad_y"], t["x"], t["mask"], t["scale"], t["shift"], None, activation)[4]
    assert torch.equal(got, expected)


def test_only_what_is_wanted_is_written() -> None:
    t = case((2, 4, 5, 3), torch.float32, False)
    shape = masked_op.shape_of(t["x"])
    assert shape is not None
    loader = Emulated()
    inputs = {name: t[name] for name in NAMES if name != "residual"}
    grad_x = guarded(t["x"], fill=0xCC)
    arrays = enqueue.ActivationArrays(*(tensor.data_ptr() for tensor in inputs.values()))
    with loader.arrays(**inputs, grad_y=t["grad_y"], grad_x=grad_x):
        enqueue.backward(
            loader, 0, shape, "relu", arrays, t["grad_y"].data_ptr(), enqueue.Gradients(x=grad_x.data_ptr())
        )
    assert [launch.kernel for launch in loader.launches] == ["masked_affine_act_backward_nchw_f32"]
    expected = reference.backward(t["grad_y"], t["x"], t["mask"], t["scale"], t["shift"], None, "relu")[0]
    assert difference(grad_x, expected) <= 2e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [False, True])
def test_flat_entry_for_plugins(dtype: torch.dtype, residual: bool) -> None:
    """The entry that takes inputs, numbers, outputs: TensorRT's ahead-of-time plugins."""
    t = case((3, 5, 7, 7), dtype, False)
    y = guarded(t["x"], fill=0xCC)
    inputs = {name: t[name] for name in NAMES if residual or name != "residual"}
    kind = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}[dtype]
    kernel = f"masked_affine_act_flat_{'residual_' if residual else ''}{kind}"
    per_block = 256 * 2 * (16 // t["x"].element_size())
    blocks = -(-t["x"].numel() // per_block)
    loader = Emulated()
    with loader.arrays(**inputs, y=y):
        numbers = [t["x"].numel(), 5, 49, ACTIVATIONS.index("relu6")]
        loader.flat(kernel, [i.data_ptr() for i in inputs.values()], numbers, y.data_ptr(), blocks, 256)
    added = t["residual"] if residual else None
    expected = reference.forward(t["x"], t["mask"], t["scale"], t["shift"], added, "relu6")
    assert difference(y, expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_to_nearest_even(dtype: torch.dtype) -> None:
    """Values halfway between two numbers, the largest ones, infinities: bit for bit as PyTorch rounds."""
    base = torch.tensor([1.0, 3.0, 0.1, 65504.0, 1e-7, 6.1e-5, 3e38, 0.0, -0.0, float("inf")])
    step = torch.finfo(dtype).eps / 2
    values = torch.cat([base, base * (1 + step), base * (1 + 3 * step), -base * (1 + step)])
    x = guarded(torch.ones(1, len(values), 1, 1, dtype=dtype))
    t = {"x": x, "mask": torch.zeros(len(values)), "scale": torch.ones(len(values)), "shift": values}
    y = run_forward(Emulated(), {**t, "residual": x}, "none", False)
    assert torch.equal(y.flatten(), values.to(dtype))
