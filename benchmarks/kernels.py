"""Times the CUDA kernels on a GPU: against the copy-bandwidth floor, PyTorch's eager mode and torch.compile.

    python benchmarks/kernels.py [--quick] [--out FILE]

Writes benchmarks/results/<device>/kernels.json, after every case, and leaves out cases that are there already; those
that failed are tried again, after the others. Exit 3: a case took the GPU's context down, and others were not tried.

Every contender is captured into a CUDA graph over as many sets of arrays as do not fit the L2 cache, so that what is
timed is the GPU and not Python; contenders take turns block by block. "floor" is the time that a plain copy needs for
the bytes that must move: in nchw the planes of masked channels are not among them, but for what lies in one sector
(`SECTOR`) with a kept one's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from passdeploy.data.base import Preprocess
from passdeploy.errors import PassdeployError
from passdeploy.kernels import build, driver, geometry, masked_affine_act
from passdeploy.kernels.input_op import prompted_input
from passdeploy.latency.measure import QUICK, Settings, interleave
from passdeploy.search.prompt import InputStage
from passdeploy.workspace import json_digest

ACTIVATIONS = ((64, 112), (256, 56), (512, 28), (1024, 14), (2048, 7))
"""Channels and height of ResNet-50's feature maps at 224 pixels."""
GOALS = {"of_copy_bandwidth": 0.85, "times_eager": 3.0, "times_compile": 1.0}
MAX_SET_BYTES = 4 * 2**30
SECTOR = 32
"""Bytes: the least that is read from memory."""
BUSY_CYCLES = 200_000
"""About 0.1 ms: longer than Python takes to enqueue an event, a replay and an event."""
AGAIN = 3
"""Exit status that asks to be started again."""
UNFINISHED = "its process ended"


class Graph:
    """A captured sequence of calls, timed with events: seconds per call of the sequence."""

    def __init__(self, calls: list[Callable[[], Any]]) -> None:
        self.calls, self.count = calls, len(calls)  # what they read has to outlive the capture
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles, loads, allocates: nothing of that can be captured
            for _ in range(3):
                calls[0]()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.kept = [call() for call in calls]

    def call(self) -> None:
        self.graph.replay()
        torch.cuda.synchronize()

    def block(self, seconds: float, calls: int) -> list[float]:
        times: list[float] = []
        start = time.perf_counter()
        while len(times) < calls or time.perf_counter() - start < seconds:
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(BUSY_CYCLES)  # the GPU is still at it while the replay is enqueued: no gap is timed
            before.record()
            self.graph.replay()
            after.record()
            after.synchronize()
            times.append(before.elapsed_time(after) / 1e3 / self.count)
        return times


Case = Callable[[], tuple[dict[str, Graph], int]]
"""Makes the contenders of a case; and the bytes that must move per call."""


def copy_bandwidth(settings: Settings) -> float:
    """Bytes read and written per second by a copy that is far larger than the cache."""
    source = torch.empty(2**29, dtype=torch.uint8, device="cuda").random_()
    to = torch.empty_like(source)
    copied = interleave({"copy": Graph([lambda: to.copy_(source)])}, settings).measurements["copy"]
    return 2 * source.numel() / (float(copied.p50 or copied.mean) / 1e3)


def sets_of(bytes_per_call: int) -> int:
    """How many sets of arrays it takes to leave nothing of the first in the cache when it comes round again."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, min(-(-4 * l2 // bytes_per_call), MAX_SET_BYTES // bytes_per_call))


def activation_case(
    channels: int, side: int, batch: int, dtype: torch.dtype, last: bool, residual: bool, backward: bool
) -> tuple[dict[str, Graph], int]:
    """Half of the channels masked, ReLU. Returns the contenders and the bytes that must move per call."""
    shape = (batch, channels, side, side)
    layout = torch.channels_last if last else torch.contiguous_format
    size = batch * channels * side * side * torch.empty((), dtype=dtype).element_size()
    mask = (torch.arange(channels, device="cuda") % 2).float()
    scale, shift = torch.rand(channels, device="cuda") + 0.5, torch.randn(channels, device="cuda")
    sets = sets_of(size * (2 + residual + (2 + residual) * backward))

    def make() -> Tensor:
        return torch.randn(shape, device="cuda").to(dtype).contiguous(memory_format=layout).requires_grad_(backward)

    xs, rs = [make() for _ in range(sets)], [make() if residual else None for _ in range(sets)]
    grads = [torch.ones_like(x) for x in xs] if backward else [None for _ in xs]
    if backward:
        for parameter in (mask, scale, shift):
            parameter.requires_grad_()

    def eager(x: Tensor, r: Tensor | None) -> Tensor:
        factor, offset = (mask * scale).to(dtype), shift.to(dtype)
        z = x * factor[:, None, None] + offset[:, None, None]
        return F.relu(z if r is None else z + r)

    def kernel(x: Tensor, r: Tensor | None) -> Tensor:
        return masked_affine_act(x, mask, scale, shift, r, "relu")

    def contender(function: Callable[[Tensor, Tensor | None], Tensor]) -> Graph:
        def call(x: Tensor, r: Tensor | None, grad: Tensor | None) -> Any:
            y = function(x, r)
            inputs = [t for t in (x, r, mask, scale, shift) if t is not None]
            # y stays, so that the next set's does not take its place, which is in the cache.
            return (y.detach(), *torch.autograd.grad(y, inputs, grad)) if backward else y

        return Graph([lambda s=s: call(*s) for s in zip(xs, rs, grads, strict=True)])

    # In nhwc the masked channels lie in the same sectors as the kept ones; in nchw small planes share some.
    plane = size // (batch * channels)
    kept = 1.0 if last else min(1.0, 0.5 * (plane + SECTOR - 1) / plane)
    moved = size * (kept + 1 + residual)
    if backward:  # reads x, the gradient and the residual; writes the gradients of x and the residual
        moved += size * (3 + 2 * residual)
    compiled = torch.compile(eager, dynamic=False)
    graphs = {"kernel": contender(kernel), "eager": contender(eager), "compile": contender(compiled)}
    return graphs, int(moved)


def input_case(batch: int, kind: str, dtype: torch.dtype, last: bool) -> tuple[dict[str, Graph], int]:
    """224 pixels; an expansive prompt of 16. Returns the contenders and the bytes that must move per call."""
    stage = InputStage(Preprocess(size=(224, 224)), kind, 16 if kind == "expansive" else 0).cuda().requires_grad_(False)
    pixels = batch * 3 * 224 * 224
    moved = pixels * (1 + torch.empty((), dtype=dtype).element_size()) + 4 * 3 * 224 * 224
    images = [
        torch.randint(0, 256, (batch, 224, 224, 3), dtype=torch.uint8, device="cuda") for _ in range(sets_of(moved))
    ]
    layout = torch.channels_last if last else torch.contiguous_format

    def eager(image: Tensor) -> Tensor:
        return stage(image.permute(0, 3, 1, 2).float() / 255).to(dtype).contiguous(memory_format=layout)

    prompt, size, border = stage.pixels(), stage.size, stage.width if kind == "expansive" else 0

    def kernel(image: Tensor) -> Tensor:  # the prompt's frame is a product of its own, of the stage and not of an image
        return prompted_input(
            image, stage.scale, stage.shift, prompt, size, border=border, dtype=dtype, channels_last=last
        )

    def contender(function: Callable[[Tensor], Tensor]) -> Graph:
        return Graph([lambda i=image: function(i) for image in images])

    compiled = torch.compile(eager, dynamic=False)
    graphs = {"kernel": contender(kernel), "eager": contender(eager), "compile": contender(compiled)}
    return graphs, moved


def cases(quick: bool) -> dict[str, Case]:
    """By name, in the order in which they run."""
    named: dict[str, Case] = {}
    batches = (64,) if quick else (1, 8, 64)
    for (channels, side), batch, last, residual, backward in itertools.product(
        ACTIVATIONS, batches, (False, True), (False, True), (False, True)
    ):
        if quick and (residual or side not in (56, 7)):
            continue
        name = f"masked_affine_act {channels}x{side}x{side} batch {batch} fp16 {'nhwc' if last else 'nchw'}"
        name += (" residual" if residual else "") + (" with backward" if backward else "")
        arguments = (channels, side, batch, torch.float16, last, residual, backward)
        named[name] = lambda a=arguments: activation_case(*a)
    for batch, kind, dtype, last in itertools.product(
        batches, ("additive", "expansive"), (torch.float16, torch.float32), (False, True)
    ):
        name = f"prompted_input {kind} batch {batch} {str(dtype).split('.')[1]} {'nhwc' if last else 'nchw'}"
        named[name] = lambda a=(batch, kind, dtype, last): input_case(*a)
    return named


def row(graphs: dict[str, Graph], moved: int, bandwidth: float, settings: Settings) -> dict[str, Any]:
    """One case's numbers; ratios above 1 say that the kernel is faster."""
    compared = interleave(graphs, settings)
    ms = {name: m.p50 if m.p50 is not None else m.mean for name, m in compared.measurements.items()}
    ratios = {name: compared.ratio(name).inverse().to_json() for name in graphs if name != "kernel"}
    return {
        "us": {name: 1e3 * value for name, value in ms.items()},
        "bytes": moved,
        "of_copy_bandwidth": moved / (ms["kernel"] / 1e3) / bandwidth,
        "times_eager": ratios["eager"],
        "times_compile": ratios["compile"],
        "noisy": any(m.noisy for m in compared.measurements.values()),
    }


def context_lost() -> bool:
    """Whether an error has left the GPU's context useless: then whatever comes next in this process fails as well."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def fill(
    done: dict[str, Any],
    named: dict[str, Case],
    take: Callable[[Case], dict[str, Any]],
    save: Callable[[], None],
    lost: Callable[[], bool] = context_lost,
) -> int:
    """Takes the cases that `done` lacks, and saves it round each; returns the exit status."""
    left = [name for name in named if name not in done["cases"]]
    # Last what failed before: where it takes its process along, the others are through by then.
    for name in sorted(left, key=lambda name: name in done["failed"]):
        done["failed"].setdefault(name, UNFINISHED)  # unless it comes back
        save()
        try:
            got = take(named[name])
        except Exception as error:  # of one case: the others are still wanted
            done["failed"][name] = f"{type(error).__name__}: {error}".splitlines()[0]
            save()
            print(f"{name:70s} {done['failed'][name]}")
            if lost():
                return AGAIN if any(other not in done["cases"] | done["failed"] for other in left) else 1
            continue
        done["cases"][name] = got
        del done["failed"][name]
        save()
        print(
            f"{name:70s} {got['us']['kernel']:8.1f} us  {got['of_copy_bandwidth']:.2f} of copy bandwidth  "
            f"{got['times_eager']['value']:.2f} x eager  {got['times_compile']['value']:.2f} x compile"
        )
    return 0


def digest() -> str:
    """Changes with whatever the numbers depend on besides the device."""
    launches = Path(geometry.__file__).read_text(encoding="utf-8")
    versions = (torch.__version__, str(torch.version.cuda))
    return json_digest([*(build.digest(source) for source in build.SOURCES), launches, *versions])


def missing() -> str | None:
    """Why the kernels can't be timed here; None when they can.

    Where their code can't be loaded the operators run the reference, which is not to be timed in their name.
    """
    if not torch.cuda.is_available():
        return "no NVIDIA GPU, or a PyTorch without CUDA"
    if reason := driver.unavailable():
        return reason
    try:
        driver.CudaBindings(torch.cuda.current_device()).prepare()
    except PassdeployError as error:
        return str(error)
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few cases, few rounds: does it work, roughly how fast")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/DEVICE/kernels.json")
    options = parser.parse_args()
    if (reason := missing()) is not None:
        print(f"benchmarks/kernels.py: {reason}; run it on a machine with a GPU (Dockerfile.gpu)", file=sys.stderr)
        return 2
    device = torch.cuda.get_device_name()
    folder = Path(__file__).parent / "results" / re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    out: Path = options.out or folder / ("kernels-quick.json" if options.quick else "kernels.json")
    settings = QUICK if options.quick else Settings(pairs=40, max_s=20.0)
    done: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {}
    done.setdefault("device", device)
    made_of = digest()
    if done.get("made_of") != made_of:  # of other kernels, or another library: nothing of it holds
        done = {"device": device, "made_of": made_of}
    done.setdefault("versions", {"torch": torch.__version__, "cuda": torch.version.cuda})
    done.setdefault("goals", GOALS)
    done.setdefault("cases", {})
    done.setdefault("failed", {})  # tried again each time
    if "copy_gb_per_s" not in done:
        done["copy_gb_per_s"] = copy_bandwidth(settings) / 1e9
    bandwidth = done["copy_gb_per_s"] * 1e9
    out.parent.mkdir(parents=True, exist_ok=True)

    def save() -> None:
        out.with_suffix(".tmp").write_text(json.dumps(done, indent=1) + "\n")
        out.with_suffix(".tmp").replace(out)

    def take(make: Case) -> dict[str, Any]:
        torch.compiler.reset()  # else torch.compile turns to dynamic shapes, and after eight cases to eager mode
        torch.cuda.empty_cache()
        return row(*make(), bandwidth, settings)

    code = fill(done, cases(options.quick), take, save)
    print(out)
    return code


if __name__ == "__main__":
    sys.exit(main())
