"""Turns a float32 ONNX graph into a float16 or bfloat16 one.

Strongly typed compilers (TensorRT-RTX, TensorRT 11) take a layer's precision from the graph, so this is where it is
decided: convolutions, matrix products and what lies between them become half; inputs and outputs of the graph, the
input stage, and operators whose intermediate sums or squares leave half's range stay float32, with casts at the seams.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from passdeploy.engines._common import one_line
from passdeploy.engines._graph import drop_unused, input_stage, name_nodes
from passdeploy.errors import BadInput

KEEP = {
    "LayerNormalization", "GroupNormalization", "InstanceNormalization", "RMSNormalization", "BatchNormalization",
    "LpNormalization", "LRN", "ReduceL1", "ReduceL2", "ReduceSum", "ReduceSumSquare", "ReduceLogSumExp", "ReduceProd",
    "Pow", "Exp", "Log", "Reciprocal", "CumSum", "Resize", "Upsample", "GridSample", "Range", "NonMaxSuppression",
    "TopK", "Loop", "If", "Scan", "RoiAlign",
}  # fmt: skip
"""Operators that stay float32: their sums and squares overflow half (65504), or their inputs must be float32."""
FOLLOW_SQUARES = {"ReduceMean", "Add", "Sqrt", "Reciprocal"}
"""Operators that stay float32 behind squares, on the way to a norm: half would hold the squares in between."""
UNBUILDABLE = {"fp16": {"Celu"}, "bf16": {"Celu", "HardSwish", "Mish"}}
"""Operators that TensorRT-RTX 1.7 takes in float32 but not in this precision (found by building each)."""
PAIRS = {"QuantizeLinear", "DequantizeLinear"}
LARGEST = float(np.finfo(np.float16).max)
SMALLEST = float(np.finfo(np.float16).smallest_subnormal)
SMALLEST_NORMAL = {"fp16": 2.0**-14, "bf16": 2.0**-126}


class _Converter:
    def __init__(self, model: Any, precision: str) -> None:
        from onnx import TensorProto, shape_inference

        self.kind = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}[precision]
        self.suffix = precision
        self.keep = KEEP | UNBUILDABLE[precision]
        self.single = TensorProto.FLOAT
        model = shape_inference.infer_shapes(model, data_prop=True)
        self.model, self.graph = model, model.graph
        values = [*self.graph.input, *self.graph.value_info, *self.graph.output]
        self.floats = {v.name for v in values if v.type.tensor_type.elem_type == self.single}
        self.weights = {t.name: t for t in self.graph.initializer if t.data_type == self.single}
        self.floats |= set(self.weights)
        self.scales = {node.input[1] for node in self.graph.node if node.op_type in PAIRS}
        self.nodes: list[Any] = []
        self.seams: dict[tuple[str, int], str] = {}

    def cast(self, name: str, to: int) -> str:
        """Name of `name` cast to `to`, made once."""
        from onnx import helper

        if (name, to) not in self.seams:
            self.seams[name, to] = f"{name}__{self.suffix if to == self.kind else 'fp32'}"
            output = self.seams[name, to]
            self.nodes.append(helper.make_node("Cast", [name], [output], name=f"cast_{output}", to=to))
        return self.seams[name, to]

    def half_weight(self, name: str) -> str:
        """Name of a half copy of a float32 initialiser, made once."""
        import ml_dtypes
        from onnx import numpy_helper

        key = (name, self.kind)
        if key not in self.seams:
            array = numpy_helper.to_array(self.weights[name])
            if name in self.scales:  # a subnormal scale loses bits; a zero one divides by zero
                array = np.maximum(array, np.float32(SMALLEST_NORMAL[self.suffix]))
            if self.suffix == "fp16":
                if np.isfinite(array).all() and np.abs(array, dtype=np.float64).max(initial=0) > LARGEST:
                    raise BadInput(f"fp16: the weight {name!r} exceeds {LARGEST:.0f}; use --precision bf16")
                half = array.astype(np.float16)
                if half.size == 1 and array.any() and not half.any():  # what guards a division by zero still does
                    half = np.copysign(np.full_like(half, SMALLEST), half)
            else:
                half = array.astype(ml_dtypes.bfloat16)
            self.seams[key] = f"{name}__{self.suffix}"
            self.graph.initializer.append(numpy_helper.from_array(half, self.seams[key]))
        return self.seams[key]

    def squared(self, node: Any, squares: set[str]) -> bool:
        """Whether a node makes squares, or goes on with nothing but `squares` on the way to a norm."""
        if node.op_type in ("Mul", "Pow"):
            return node.op_type == "Pow" or node.input[0] == node.input[1]
        read = self.floats.intersection(node.input).difference(self.weights)
        return node.op_type in FOLLOW_SQUARES and bool(read) and read <= squares

    def convert(self) -> Any:
        from onnx import helper

        # Of a quantised graph the first layer's pair is among them: what it hands to the layer is half, as elsewhere.
        pairs = {node.name for node in self.graph.node if node.op_type == "DequantizeLinear"}
        keep = input_stage(self.graph) - pairs
        halves: set[str] = set()  # values that are half in the new graph, under their old names
        squares: set[str] = set()
        outputs = {value.name for value in self.graph.output}
        for node in list(self.graph.node):
            stays = node.name in keep or node.op_type in self.keep or any(a.HasField("g") for a in node.attribute)
            if self.squared(node, squares):
                squares.update(node.output)
                stays = True
            if not stays and node.op_type in ("Cast", "ConstantOfShape", "Constant", "EyeLike", "CastLike"):
                stays = True  # they name their type; what they make is cast where it is used
            for index, name in enumerate(node.input):
                if name in self.weights:
                    node.input[index] = name if stays else self.half_weight(name)
                elif name in self.floats:
                    if stays and name in halves:
                        node.input[index] = self.cast(name, self.single)
                    elif not stays and name not in halves:
                        node.input[index] = self.cast(name, self.kind)
            renamed = []
            if not stays:
                for index, name in enumerate(node.output):
                    if name in outputs and name in self.floats:
                        node.output[index] = f"{name}__{self.suffix}"
                        renamed.append(name)
                        self.seams[name, self.kind] = node.output[index]
                    elif name in self.floats:
                        halves.add(name)
            self.nodes.append(node)
            for name in renamed:  # a graph output stays float32 under its own name
                half = f"{name}__{self.suffix}"
                self.nodes.append(helper.make_node("Cast", [half], [name], name=f"cast_{name}", to=self.single))
        del self.graph.node[:]
        self.graph.node.extend(self.nodes)
        del self.graph.value_info[:]  # float32 everywhere: no longer true
        drop_unused(self.graph)
        return self.model


def _lift_guards(graph: Any) -> None:
    """Makes initialisers of constant nodes with a number that float16 rounds to zero, as of those given so already."""
    from onnx import TensorProto, numpy_helper

    for node in [node for node in graph.node if node.op_type == "Constant"]:
        values = [a.t for a in node.attribute if a.name == "value" and a.t.data_type == TensorProto.FLOAT]
        array = numpy_helper.to_array(values[0]) if values else np.zeros(0, np.float32)
        if array.size == 1 and array.any() and not array.astype(np.float16).any():
            graph.initializer.append(numpy_helper.from_array(array, node.output[0]))
            graph.node.remove(node)


def to_half(data: bytes, precision: str) -> bytes:
    """A serialised ONNX model with ``fp16`` or ``bf16`` arithmetic and unchanged float32 inputs and outputs.

    Quantise/dequantise pairs keep their integers; what is not quantised becomes half.

    Raises:
        BadInput: A weight that float16 can't hold, or a graph that is inconsistent afterwards.
    """
    import onnx

    model = onnx.load_model_from_string(data)
    name_nodes(model.graph)
    _lift_guards(model.graph)
    if precision == "bf16":
        model = _raise_opset(model, 22)  # Conv and pooling take bfloat16 from opset 22 on
    elif any(node.op_type in PAIRS for node in model.graph.node):
        model = _raise_opset(model, 19)  # scales may be float16 from opset 19 on
    converted = _Converter(model, precision).convert()
    try:
        onnx.checker.check_model(converted, full_check=True)
    except Exception as error:
        raise BadInput(f"{precision}: the graph does not convert: {one_line(error)}; use --precision fp32") from None
    result: bytes = converted.SerializeToString()
    return result


def check_range(data: bytes, half: bytes, images: np.ndarray) -> None:
    """Refuses a float16 graph some of whose values would be infinite.

    ONNX Runtime's CPU kernels compute such a graph in float32, where nothing overflows: its outputs don't tell.

    Args:
        data: The float32 graph.
        half: What became of it.
        images: Real ones, as many as fill a batch of `data` or more.

    Raises:
        BadInput: The largest value, and how large it is.
    """
    import onnx
    import onnxruntime as ort
    from onnx import TensorProto, helper, shape_inference

    def values(model: Any, kind: int) -> set[str]:
        inferred = shape_inference.infer_shapes(model, data_prop=True).graph
        infos = [*inferred.value_info, *inferred.output]
        return {value.name for value in infos if value.type.tensor_type.elem_type == kind}

    model = onnx.load_model_from_string(data)
    halves = values(onnx.load_model_from_string(half), TensorProto.FLOAT16)
    names = sorted(values(model, TensorProto.FLOAT) & (halves | {name.removesuffix("__fp16") for name in halves}))
    graph = model.graph
    del graph.output[:]
    for name in names:
        graph.node.append(helper.make_node("Abs", [name], [f"{name}__size"]))
        graph.node.append(helper.make_node("ReduceMax", [f"{name}__size"], [f"{name}__top"], keepdims=0))
        graph.output.append(helper.make_tensor_value_info(f"{name}__top", TensorProto.FLOAT, []))
    if not names:
        return
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    tops = np.zeros(len(names))
    first = session.get_inputs()[0]
    batch = first.shape[0] if isinstance(first.shape[0], int) else 1
    for start in range(0, len(images) - batch + 1, batch):
        found = np.array(session.run(None, {first.name: images[start : start + batch]}))
        tops = np.maximum(tops, np.where(np.isfinite(found), found, 0))  # what is infinite here is a mask
    worst = int(tops.argmax())
    if tops[worst] > LARGEST:
        raise BadInput(
            f"fp16: {names[worst]!r} reaches {tops[worst]:.3g} on validation images, half ends at {LARGEST:.0f}; "
            "use --precision bf16"
        )


def _raise_opset(model: Any, wanted: int) -> Any:
    from onnx import version_converter

    current = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    if current >= wanted:
        return model
    try:
        return version_converter.convert_version(model, wanted)
    except Exception as error:
        raise BadInput(
            f"half precision: needs ONNX opset {wanted}, the graph has {current}: {one_line(error)}"
        ) from None
