from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from passdeploy.engines import _quantize
from passdeploy.engines._convert import to_half
from passdeploy.engines._graph import input_stage
from passdeploy.engines._quantize import Recipe, calibration_images, for_cpu, for_tensorrt, for_tensorrt_fp8, quantize
from passdeploy.engines.base import CompileInput
from passdeploy.errors import BadInput
from passdeploy.export import export_onnx
from tests.engines.conftest import SIZE, Case

RECIPES = {"cpu": for_cpu(), "tensorrt": for_tensorrt()}


@pytest.mark.parametrize("name", RECIPES)
def test_normalisation_and_prompt_stay_in_float32(case: Case, name: str) -> None:
    graph = onnx.load_model_from_string(quantize(case.source, RECIPES[name])).graph
    produced = {output: node for node in graph.node for output in node.output}
    conv = next(node for node in graph.node if node.op_type == "Conv")
    node = produced[conv.input[0]]
    assert node.op_type == "DequantizeLinear"
    stage = input_stage(graph)
    assert stage
    before = [n for n in graph.node if n.name in stage and n.op_type not in ("QuantizeLinear", "DequantizeLinear")]
    assert before
    for node in before:
        for source in node.input:
            assert source not in produced or produced[source].op_type != "DequantizeLinear"


@pytest.mark.parametrize("recipe", [for_tensorrt(), for_tensorrt_fp8()])
def test_tensorrt_can_fuse_activations_and_take_every_layers_input_in_8_bits(case: Case, recipe: Recipe) -> None:
    graph = onnx.load_model_from_string(to_half(quantize(case.source, recipe), "fp16")).graph
    produced = {output: node for node in graph.node for output in node.output}
    fed = {(node.op_type, produced[node.input[0]].op_type) for node in graph.node if node.input[0] in produced}
    assert ("Relu", "DequantizeLinear") not in fed
    assert {kind for layer, kind in fed if layer == "Conv"} == {"DequantizeLinear"}, "the first one's, too"
    casts = [node for node in graph.node if node.op_type == "Cast"]
    assert not any(produced.get(node.input[0], node).op_type == "DequantizeLinear" for node in casts)


def test_tensorrt_pairs_are_symmetric_and_biases_float32(case: Case) -> None:
    graph = onnx.load_model_from_string(quantize(case.source, for_tensorrt())).graph
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    pairs = [node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert pairs
    for node in pairs:
        zero = constants[node.input[2]]
        assert zero.dtype == np.int8 and not zero.any()
    for node in graph.node:
        if node.op_type == "Conv" and len(node.input) == 3:
            assert constants[node.input[2]].dtype == np.float32


@pytest.mark.parametrize(
    ("flags", "machine", "largest"),
    [
        (["avx2"], "x86_64", 64),
        (["avx512_vnni"], "x86_64", 127),
        (["amx_int8"], "x86_64", 127),
        (["asimd"], "aarch64", 127),
    ],
)
def test_weights_take_seven_bits_where_sums_would_saturate(
    case: Case, monkeypatch: pytest.MonkeyPatch, flags: list[str], machine: str, largest: int
) -> None:
    monkeypatch.setattr(_quantize, "cpu_flags", lambda: flags)
    monkeypatch.setattr(_quantize.platform, "machine", lambda: machine)
    graph = onnx.load_model_from_string(quantize(case.source, for_cpu())).graph
    weights = [
        numpy_helper.to_array(w) for w in graph.initializer if w.data_type == onnx.TensorProto.INT8 and len(w.dims) == 4
    ]
    assert weights
    assert largest - 1 <= max(int(np.abs(w.astype(int)).max()) for w in weights) <= largest


@pytest.mark.parametrize(("batch", "used"), [(1, 256), (-1, 256), (100, 200), (150, 150), (300, 300)])
def test_whole_batches_of_calibration_images_come_from_all_of_them(batch: int, used: int) -> None:
    """Those of a folder are sorted by class."""
    samples = np.arange(max(256, batch), dtype=np.float64).reshape(-1, 1, 1, 1)
    found = calibration_images(samples, batch)
    assert found.shape == (used, 1, 1, 1) and found.dtype == np.float32
    assert len(np.unique(found)) == used
    assert found.max() >= len(samples) - 3 and np.diff(found.ravel()).max() <= 2


@pytest.mark.parametrize("samples", [None, np.zeros((0, *SIZE), np.float32)])
@pytest.mark.parametrize(("recipe", "precision"), [(for_cpu(), "int8"), (for_tensorrt_fp8(), "fp8")])
def test_no_images_no_calibration(case: Case, recipe: Recipe, precision: str, samples: np.ndarray | None) -> None:
    with pytest.raises(BadInput, match=rf"{precision}: needs real images to calibrate on; give --data"):
        quantize(CompileInput(case.onnx, samples=samples), recipe)


def test_too_few_images_for_the_batch(case4: Case) -> None:
    with pytest.raises(BadInput, match="3 calibration images do not fill one batch of 4"):
        quantize(replace(case4.source, samples=case4.images[:3]), for_cpu())


def test_fp8_holds_the_activations_of_one_batch_at_a_time(case4: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    from onnxruntime.quantization.calibrate import HistogramCollector

    held, collect = [], HistogramCollector.collect

    def watched(self: HistogramCollector, arrays: dict[str, list[np.ndarray]]) -> None:
        held.append(max(map(len, arrays.values())))
        collect(self, arrays)

    monkeypatch.setattr(HistogramCollector, "collect", watched)
    assert quantize(case4.source, for_tensorrt_fp8())
    assert held == [1] * (len(case4.images) // 4)


class Block(nn.Module):
    """Self-attention with its residual sum and norm; or, without, a convolution and a softmax over the classes."""

    def __init__(self, attention: bool) -> None:
        super().__init__()
        self.attention, self.conv, self.norm = attention, nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8)
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        if not self.attention:
            return torch.softmax(self.head((x + torch.relu(x)).mean((2, 3))), 1)
        x = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm(x)).chunk(3, 2)
        x = x + torch.softmax(q @ k.transpose(1, 2), 2) @ v
        return self.head(self.norm(x).mean(1))


@pytest.mark.parametrize("attention", [True, False])
def test_what_a_transformer_adds_up_and_norms_stays_in_float32_on_a_cpu(attention: bool, tmp_path: Path) -> None:
    path = export_onnx(Block(attention), tmp_path / "model.onnx", SIZE)
    samples = np.random.default_rng(0).random((4, *SIZE), dtype=np.float32)
    graph = onnx.load_model_from_string(quantize(CompileInput(path, samples=samples), for_cpu())).graph
    paired = {name for node in graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    fed = {node.op_type for node in graph.node if paired.intersection(node.input)}
    assert {"Conv"} < fed
    assert fed.isdisjoint({"Add", "LayerNormalization", "Softmax"}) == attention


def installed() -> bool:
    from passdeploy.data import search_path

    return any(p.is_file() for root in search_path() for p in root.glob("fashion-mnist/t10k-images-idx3-ubyte*"))


def accuracy(data: bytes, images: np.ndarray, labels: np.ndarray, fused: bool) -> float:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if not fused:  # what the pairs say, operator by operator: stands in for hardware that is not here
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    batch = session.get_inputs()[0].shape[0]
    logits = [session.run(None, {"images": images[i : i + batch]})[0] for i in range(0, len(images), batch)]
    return float((np.concatenate(logits).argmax(1) == labels).mean())


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[CompileInput, np.ndarray, np.ndarray]:
    """The dense demo model with calibration images from the validation split, test images and labels."""
    import torch

    from passdeploy.data import load
    from passdeploy.export import export_onnx
    from passdeploy.models import build
    from passdeploy.search.prompt import InputStage, Prompted
    from passdeploy.weights import load_weights, packaged_weights

    data = load("fashion-mnist")
    weights = packaged_weights("resnet20", data)
    assert weights is not None
    network = build("resnet20", len(data.classes))
    load_weights(network, weights)
    model = Prompted(InputStage(data.preprocess), network).eval()
    path = export_onnx(model, tmp_path_factory.mktemp("demo") / "model.onnx", (3, *data.preprocess.size), 50)
    calibration = data.val.images(torch.arange(100)).numpy()
    return (
        CompileInput(path, samples=calibration),
        data.test.images(torch.arange(2000)).numpy(),
        data.test.labels[:2000].numpy(),
    )


@pytest.mark.skipif(not installed(), reason="Fashion-MNIST is not installed")
@pytest.mark.parametrize("name", RECIPES)
def test_int8_keeps_the_demo_models_accuracy(demo: tuple[CompileInput, np.ndarray, np.ndarray], name: str) -> None:
    """Within one point of float32 on ONNX Runtime, and as the graph for TensorRT says."""
    source, images, labels = demo
    if name == "tensorrt":  # unfused, so slow
        images, labels = images[:1000], labels[:1000]
    int8 = quantize(source, RECIPES[name])
    if name == "tensorrt":
        int8 = to_half(int8, "fp16")  # as the backend does: what is not quantised runs in fp16
    full = accuracy(source.onnx.read_bytes(), images, labels, fused=True)
    assert full > 0.9
    assert accuracy(int8, images, labels, fused=name == "cpu") >= full - 0.01
