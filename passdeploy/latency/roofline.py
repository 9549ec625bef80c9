"""Analytic rooflines for targets that are neither attached nor profiled: a guess to steer by, never a claim.

Per operator: the larger of arithmetic and memory traffic, plus a launch floor; the whole is their sum (Williams et al.,
"Roofline", CACM 52(4), 2009). Arithmetic comes in whole waves of output tiles over the multiprocessors (NVIDIA, "Matrix
Multiplication Background User's Guide"), with the tile size and the split of the inner dimension that is fastest, as
kernel libraries choose. It knows nothing of caches, of fusion beyond activations and norms, or of the compiler's whims.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from passdeploy.errors import Unavailable
from passdeploy.latency.features import Features

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
        tiles: Output pixels and channels that one multiprocessor may work on at a time, and how efficient that is.
        step: Channels in which the hardware works.
    """

    rate: dict[str, float]
    bandwidth: float
    processors: int
    launch_s: float
    tiles: tuple[tuple[int, int, float], ...]
    step: dict[str, int]


TENSOR_CORES = {"fp32": 8, "fp16": 8, "bf16": 8, "int8": 32, "fp8": 32}
EFFICIENCY = 0.6
"""Share of the peak that the best kernels reach on large convolutions."""
TILES = ((128, 128, 1.0), (128, 64, 0.9), (64, 64, 0.75), (64, 32, 0.55))
"""Output pixels and channels that one multiprocessor works on at a time, and the share of `EFFICIENCY` that gives."""
SPLITS = (1, 4)
"""Parts into which the inner dimension may be split, so that a small layer fills more multiprocessors."""
CPU_TILES = ((1, 1, 1.0),)
LAUNCH = 5e-6
"""Seconds per operator on a GPU: kernel start and tail. NVIDIA's A100 figures at batch 1 in INT8 (TensorRT 8.4,
"TensorFlow Quantization Toolkit, Model Zoo Results") are 0.16 ms for MobileNet-v1 (28 operators), 0.30 ms for
MobileNet-v2 (53) and 0.45 ms for ResNet-50 (54): 5 to 6 microseconds an operator where arithmetic hardly counts."""
SPLIT_S = 1e-6
"""Seconds for adding the parts up."""


def _gpu(fp32: float, fp16: float, int8: float, fp8: float, bandwidth: float, processors: int) -> Machine:
    """From TFLOP/s (dense, without sparsity) and GB/s."""
    rate = {"fp32": fp32, "fp16": fp16, "bf16": fp16, "int8": int8, "fp8": fp8 or fp16}
    return Machine({k: v * 1e12 for k, v in rate.items()}, bandwidth * 1e9, processors, LAUNCH, TILES, TENSOR_CORES)


# fp32 without TF32, tensor-core rates without sparsity, of fp16 and fp8 those that add up in fp32. Sources: NVIDIA's
# data sheets "A100 80GB PCIe" (2021), "A10" (2021), "T4" (2018), "L4" (2023), "L40S" (2023), "Ada GPU architecture"
# (2022, RTX 4090), "H100" (2023, SXM), "H200" (2024, SXM).
MACHINES = {
    "a100": _gpu(19.5, 312, 624, 0, 1935, 108),
    "a10": _gpu(31.2, 125, 250, 0, 600, 72),
    "t4": _gpu(8.1, 65, 130, 0, 320, 40),
    "l4": _gpu(30.3, 121, 242, 242, 300, 58),
    "l40s": _gpu(91.6, 362, 733, 733, 864, 142),
    "rtx4090": _gpu(82.6, 165, 661, 330, 1008, 128),
    "h100": _gpu(67, 989, 1979, 1979, 3350, 132),
    "h200": _gpu(67, 989, 1979, 1979, 4800, 132),
}
# A server core with AVX2: two 8-wide fused multiply-adds a cycle at 2.8 GHz; a share of the memory channels.
CPU = Machine({"fp32": 90e9, "int8": 180e9}, 10e9, 1, 3e-6, CPU_TILES, {"fp32": 8, "int8": 8})


class Roofline:
    """Predicts milliseconds from kept units, with the interface of a measured latency model.

    Args:
        operators: Of the network, in execution order.
        units: Units per group.
        target: Names the machine, precision, batch and threads.

    Raises:
        Unavailable: It is a GPU whose data sheet is not known here.
    """

    kind = "analytic"

    def __init__(self, operators: Sequence[Operator], units: Sequence[int], target: Target) -> None:
        if target.compute_capability is not None and target.name not in MACHINES:
            raise Unavailable(
                f"target {target.name}: there is no analytic model of {target.device}; "
                "give a measured one with --profile"
            )
        machine = MACHINES.get(target.name, CPU)
        self.machine, self.target = machine, target
        self.units = np.asarray(units, dtype=float)
        self.step = machine.step.get(target.precision, 8)
        self.features = Features(operators, units, self.step)
        rate = machine.rate.get(target.precision, machine.rate["fp32"]) * EFFICIENCY
        self._processors = machine.processors if target.name in MACHINES else target.threads
        self._per_processor = rate / machine.processors
        self._bytes = {"fp32": 4, "int8": 1, "fp8": 1}.get(target.precision, 2)
        self.dense_ms = float(self.predict_many(self.units[None])[0])

    def _seconds(self, w: Any, lib: Any, ceil: Any) -> Any:
        f, batch, machine = self.features, self.target.batch, self.machine

        def constant(array: np.ndarray) -> Any:
            return array if lib is np else lib.as_tensor(array, dtype=w.dtype, device=w.device)

        cin, cout, runs = f.channels(w, lib)
        # Grouped: the inputs of one output are fixed (`work` and `weight_bytes` hold them); a tile then fills one
        # group only.
        grouped = constant(f.grouped.astype(float))
        inputs = cin * (1 - grouped) + grouped
        padded = ceil(cin / self.step) * self.step * (1 - grouped) + grouped
        pixels = batch * f.out_area
        inner = 2 * constant(f.work / f.out_area) * padded
        arithmetic: Any = None
        for rows, columns, efficiency in machine.tiles:
            tiles = constant(np.ceil(pixels / rows)) * ceil(cout / columns)
            for split in SPLITS if machine.processors > 1 else (1,):
                waves = lib.clip(ceil(tiles * split / self._processors), 1.0, None)
                seconds = waves * (rows * columns / (split * efficiency * self._per_processor)) * inner
                if split > 1:
                    seconds = seconds + SPLIT_S
                arithmetic = seconds if arithmetic is None else lib.minimum(arithmetic, seconds)
        moved = batch * (cin * constant(f.in_area) + cout * constant(f.out_area))
        moved = (moved + constant(f.weight_bytes / 4) * inputs * cout) * self._bytes
        each = lib.maximum(arithmetic, moved / machine.bandwidth) + machine.launch_s
        return (runs * each).sum(1)

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
