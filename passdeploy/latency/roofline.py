"""Analytic rooflines for targets that are neither attached nor profiled: a guess to steer by, never a claim.

Per operator: the larger of arithmetic (in whole waves of output tiles over the multiprocessors) and memory traffic,
plus a launch floor; the whole is their sum (Williams et al., "Roofline", CACM 52(4), 2009; wave quantisation: NVIDIA,
"Matrix Multiplication Background"). It knows nothing of fusion, caches or the compiler's choice of kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

    from passdeploy.groups import Operator
    from passdeploy.targets import Target


@dataclass(frozen=True)
class Machine:
    """What a data sheet says.

    Attributes:
        rate: Peak dense operations per second (2 per multiply-add), by precision.
        bandwidth: Bytes per second of the main memory.
        processors: Multiprocessors; CPU threads are taken from the target.
        launch_s: Floor per operator.
        tile: Output pixels and channels that one multiprocessor works on at a time.
        step: Channels in which the hardware works.
    """

    rate: dict[str, float]
    bandwidth: float
    processors: int
    launch_s: float
    tile: tuple[int, int]
    step: dict[str, int]


TENSOR_CORES = {"fp32": 8, "fp16": 8, "bf16": 8, "int8": 32, "fp8": 32}
EFFICIENCY = 0.5
"""Share of the peak that good kernels reach on convolutions."""
TILE = (128, 64)
LAUNCH = 2e-6
"""Per kernel inside a CUDA graph."""


def _gpu(fp32: float, fp16: float, int8: float, fp8: float, bandwidth: float, processors: int) -> Machine:
    """From TFLOP/s (dense, without sparsity) and GB/s."""
    rate = {"fp32": fp32, "fp16": fp16, "bf16": fp16, "int8": int8, "fp8": fp8 or fp16}
    return Machine({k: v * 1e12 for k, v in rate.items()}, bandwidth * 1e9, processors, LAUNCH, TILE, TENSOR_CORES)


# fp32 without TF32, tensor-core rates without sparsity. Sources: NVIDIA's data sheets "A100 80GB PCIe" (2021),
# "A10" (2021), "T4" (2018), "L4" (2023), "L40S" (2023), "Ada GPU architecture" (2022, RTX 4090), "H100" (2023, SXM),
# "H200" (2024, SXM).
MACHINES = {
    "a100": _gpu(19.5, 312, 624, 0, 1935, 108),
    "a10": _gpu(31.2, 125, 250, 0, 600, 72),
    "t4": _gpu(8.1, 65, 130, 0, 320, 40),
    "l4": _gpu(30.3, 121, 242, 242, 300, 58),
    "l40s": _gpu(91.6, 362, 733, 733, 864, 142),
    "rtx4090": _gpu(82.6, 165, 661, 661, 1008, 128),
    "h100": _gpu(67, 989, 1979, 1979, 3350, 132),
    "h200": _gpu(67, 989, 1979, 1979, 4800, 132),
}
# A server core with AVX2: two 8-wide fused multiply-adds a cycle at 2.8 GHz; a share of the memory channels.
CPU = Machine({"fp32": 90e9, "int8": 180e9}, 10e9, 1, 3e-6, (1, 1), {"fp32": 8, "int8": 8})


class Roofline:
    """Predicts milliseconds from kept units, with the interface of a measured latency model.

    Args:
        operators: Of the network, in execution order.
        units: Units per group.
        target: Names the machine, precision, batch and threads.
    """

    def __init__(self, operators: Sequence[Operator], units: Sequence[int], target: Target) -> None:
        machine = MACHINES.get(target.name, CPU)
        self.machine, self.target = machine, target
        self.operators, self.units = tuple(operators), np.asarray(units, dtype=float)
        processors = machine.processors if target.name in MACHINES else target.threads
        rate = machine.rate.get(target.precision, machine.rate["fp32"]) * EFFICIENCY
        self._processors = processors
        self._per_processor = rate / machine.processors
        self._bytes = {"fp32": 4, "int8": 1, "fp8": 1}.get(target.precision, 2)
        self.step = machine.step.get(target.precision, 8)
        self.dense_ms = float(self.predict_many(self.units[None])[0])

    def _channels(self, w: Any, shares: Sequence[tuple[int, int]], free: int) -> Any:
        total = free + 0 * w[:, 0]
        for g, per in shares:
            total = total + w[:, g] * per
        return total

    def _seconds(self, w: Any, lib: Any, ceil: Any) -> Any:
        batch, tile = self.target.batch, self.machine.tile
        total = 0 * w[:, 0]
        for op in self.operators:
            cin = self._channels(w, op.in_units, op.in_free)
            cout = self._channels(w, op.out_units, op.out_free)
            depthwise = op.kind == "depthwise"
            kernel = op.kernel[0] * op.kernel[1]
            pixels = batch * op.out_hw[0] * op.out_hw[1]
            per_output = kernel * (1 if depthwise else ceil(cin / self.step) * self.step / max(1, op.groups))
            tiles = -(-pixels // tile[0]) * ceil(cout / tile[1])
            waves = ceil(tiles / self._processors)
            arithmetic = waves * (tile[0] * tile[1] * 2 * per_output) / self._per_processor
            moved = batch * (cin * op.in_hw[0] * op.in_hw[1] + cout * op.out_hw[0] * op.out_hw[1])
            moved = (moved + kernel * cin * cout / (cin if depthwise else max(1, op.groups))) * self._bytes
            seconds = lib.maximum(arithmetic, moved / self.machine.bandwidth) + self.machine.launch_s
            for g in op.gates:
                seconds = seconds * (w[:, g] if lib is not np else (w[:, g] > 0))
            total = total + seconds
        return total

    def predict_many(self, w: np.ndarray) -> np.ndarray:
        """Predicted milliseconds [n], for kept units [n, groups]."""
        seconds: np.ndarray = self._seconds(np.asarray(w, dtype=float), np, np.ceil)
        return 1e3 * seconds

    def predict(self, w: np.ndarray) -> float:
        """Predicted milliseconds for kept units [groups]."""
        return float(self.predict_many(np.asarray(w)[None])[0])

    def predict_soft(self, w: torch.Tensor) -> torch.Tensor:
        """Predicted milliseconds (a scalar) for fractional kept units [groups]: linear between the steps."""
        import torch

        seconds: torch.Tensor = self._seconds(w[None], torch, lambda value: value)[0]
        return 1e3 * seconds

    def summary(self) -> dict[str, Any]:
        """The report's ``predictor``: analytic, with no measured error."""
        return {"kind": "analytic", "mape": None, "max_ape": None, "n": 0, "repeatability": None}
