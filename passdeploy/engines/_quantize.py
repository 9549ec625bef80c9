"""int8: an ONNX graph with quantise/dequantise pairs, calibrated on real images (post-training, static).

The pairs say where an engine may compute in 8 bits. Compilers fuse different patterns, so each has its own recipe; what
a graph with pairs computes does not depend on the compiler, up to rounding, which is how its accuracy is measured
without the hardware.
"""

from __future__ import annotations

import contextlib
import io
import logging
import platform
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from passdeploy.engines._aoti import cpu_flags
from passdeploy.engines._common import one_line
from passdeploy.engines._graph import input_stage, name_nodes
from passdeploy.engines.base import CompileInput
from passdeploy.errors import BadInput

CALIBRATION_IMAGES = 256
OPEN_BATCH = 16
"""Images at a time where the graph does not say."""

EXACT_SUMS = ("amx_int8", "avx512_vnni", "avx_vnni", "asimd")
"""CPU features (the last is ARM's) of which any one adds products of 8 bits without saturating."""


@dataclass(frozen=True)
class Recipe:
    """How pairs are placed.

    Attributes:
        activations: ONNX Runtime's `QuantType`: ``QUInt8`` (asymmetric) or ``QInt8``.
        weights: Likewise.
        method: How a tensor's range is found: ``MinMax``, ``Entropy`` or ``Percentile``.
        seven_bits: Whether weights take 7 of their 8 bits.
        cpu_flags_any: CPU features of which the engine needs any one, lest its sums saturate; empty: none.
        operators: Types that are quantised; None: all that ONNX Runtime has kernels for.
        options: ONNX Runtime's ``extra_options``.
    """

    activations: str
    weights: str = "QInt8"
    method: str = "MinMax"
    seven_bits: bool = False
    cpu_flags_any: tuple[str, ...] = ()
    operators: tuple[str, ...] | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def precision(self) -> str:
        """What this makes: ``int8`` or ``fp8``."""
        return "fp8" if "FLOAT8" in self.weights else "int8"


def for_cpu() -> Recipe:
    """ONNX Runtime's and OpenVINO's kernels: unsigned asymmetric activations, signed weights per channel.

    On x86 without VNNI or AMX two products are added in 16 bits, which saturate: there the demo's dense network lost
    2.1 points, and 0.05 with weights of 7 bits, as ONNX Runtime recommends
    (https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html).
    """
    x86 = platform.machine().lower() in ("x86_64", "amd64", "i686")
    exact = not x86 or any(flag in EXACT_SUMS for flag in cpu_flags())
    return Recipe(
        "QUInt8",
        seven_bits=not exact,
        cpu_flags_any=EXACT_SUMS if exact else (),
        options={"OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"]},
    )


_TENSOR_CORES = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_RESIDUALS = ("Add", "MaxPool")
_ACTIVATED = (*_TENSOR_CORES, "Add")
"""What an activation may follow: TensorRT fuses the two only where no pair stands between them. Whatever reads the
activation's output quantises it."""


def for_tensorrt() -> Recipe:
    """TensorRT and TensorRT-RTX: everything symmetric and signed, biases left in float32, weights with whole pairs."""
    return Recipe(
        "QInt8",
        operators=_TENSOR_CORES + _RESIDUALS,
        options={
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "QuantizeBias": False,
            "AddQDQPairToWeight": True,
            "OpTypesToExcludeOutputQuantization": list(_ACTIVATED),
        },
    )


def for_tensorrt_fp8() -> Recipe:
    """TensorRT's 8-bit floating point (E4M3), from compute capability 8.9 on."""
    return Recipe(
        "QFLOAT8E4M3FN",
        weights="QFLOAT8E4M3FN",
        method="Distribution",
        operators=_TENSOR_CORES,
        options={
            "QuantizeBias": False,
            "AddQDQPairToWeight": True,
            "OpTypesToExcludeOutputQuantization": list(_ACTIVATED),
            # Histograms are made of one batch after the other: all activations of all images take many gigabytes.
            "CalibStridedMinMax": 1,
        },
    )


class _Images:
    """Calibration images one batch at a time, as ONNX Runtime's calibrator asks for them."""

    def __init__(self, name: str, samples: np.ndarray, batch: int) -> None:
        self.name, self.samples, self.batch = name, samples, batch
        self.set_range(0, len(self))

    def __len__(self) -> int:
        return len(self.samples) // self.batch

    def set_range(self, start_index: int, end_index: int) -> None:
        """Goes on with these batches."""
        self.at, self.end = start_index, end_index

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next batch; None when they are used up."""
        if self.at == self.end:
            return None
        self.at += 1
        return {self.name: self.samples[(self.at - 1) * self.batch : self.at * self.batch]}


def calibration_images(samples: np.ndarray, batch: int) -> np.ndarray:
    """Those of `samples` that ranges come from: whole batches; `batch` is -1 where the graph leaves it open.

    Spread over the first `CALIBRATION_IMAGES`, which are often sorted by class: of batches of 200 the last 56 are left
    over.
    """
    batch = batch if batch > 0 else OPEN_BATCH
    used = samples[: max(batch, CALIBRATION_IMAGES)]
    count = len(used) // batch * batch
    chosen = used if count == len(used) else used[np.arange(count) * len(used) // max(1, count)]
    return np.ascontiguousarray(chosen, dtype=np.float32)


def quantize(source: CompileInput, recipe: Recipe) -> bytes:
    """A serialised ONNX model with quantise/dequantise pairs; float32 inputs and outputs.

    Args:
        source: `samples` calibrate: real images, at least one batch of the exported size.
        recipe: Of the backend that will compile it.

    Raises:
        BadInput: No or too few calibration images, or operators that can't be quantised.
    """
    import onnx
    import onnxruntime as ort
    from onnxruntime import quantization as q

    if source.samples is None or len(source.samples) == 0:
        raise BadInput(f"{recipe.precision}: needs real images to calibrate on; give --data")
    with tempfile.TemporaryDirectory(prefix="passdeploy-int8-") as folder:
        plain, paired = Path(folder, "plain.onnx"), Path(folder, "int8.onnx")
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC  # folds batch norms
        options.optimized_model_filepath = str(plain)
        options.log_severity_level = 3
        root = logging.getLogger()
        level = root.level
        root.setLevel(logging.ERROR)  # ONNX Runtime's quantiser logs advice through the root logger
        try:
            ort.InferenceSession(str(source.onnx), options, providers=["CPUExecutionProvider"])
            model = onnx.load(plain)
            name_nodes(model.graph)
            onnx.save(model, plain)
            images = model.graph.input[0]
            first = images.type.tensor_type.shape.dim[0]
            batch = first.dim_value if first.HasField("dim_value") else OPEN_BATCH
            samples = calibration_images(source.samples, batch)
            if not len(samples):
                raise BadInput(
                    f"{recipe.precision}: {len(source.samples)} calibration images do not fill one batch of {batch}; "
                    "give more"
                )
            with contextlib.redirect_stdout(io.StringIO()):  # some calibrators print
                q.quantize_static(
                    str(plain),
                    str(paired),
                    _reader(images.name, samples, batch),
                    quant_format=q.QuantFormat.QDQ,
                    op_types_to_quantize=_operators(recipe, model.graph),
                    per_channel=True,
                    reduce_range=recipe.seven_bits,
                    activation_type=getattr(q.QuantType, recipe.activations),
                    weight_type=getattr(q.QuantType, recipe.weights),
                    nodes_to_exclude=sorted(input_stage(model.graph)),
                    calibrate_method=getattr(q.CalibrationMethod, recipe.method),
                    extra_options=recipe.options,
                )
            return paired.read_bytes()
        except BadInput:
            raise
        except Exception as error:
            raise BadInput(
                f"{recipe.precision}: the graph cannot be quantised: {one_line(error)}; use another --precision"
            ) from None
        finally:
            root.setLevel(level)


def _operators(recipe: Recipe, graph: Any) -> list[str] | None:
    # The sums of a transformer's residual stream carry outliers that 8 bits lose, and nothing fuses with them there;
    # its norms and softmaxes lose as much.
    if _has_attention(graph):
        return list(_TENSOR_CORES)
    return None if recipe.operators is None else list(recipe.operators)


def _has_attention(graph: Any) -> bool:
    """Whether a softmax weighs something in a matrix product; one over the classes does not."""
    shares: set[str] = set()
    for node in graph.node:
        reads = not shares.isdisjoint(node.input)
        if node.op_type == "Attention" or (node.op_type == "MatMul" and reads):
            return True
        if node.op_type == "Softmax" or (node.op_type in ("Where", "Reshape", "Transpose") and reads):
            shares.update(node.output)
    return False


def _reader(name: str, samples: np.ndarray, batch: int) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(_Images, CalibrationDataReader):  # type: ignore[misc]
        """`_Images` in the type that ONNX Runtime insists on."""

    return Reader(name, samples, batch)
