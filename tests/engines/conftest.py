"""A small network as the pipeline exports it, once per session."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from passdeploy.data.base import Preprocess
from passdeploy.engines.base import CompileInput
from passdeploy.export import export_onnx
from passdeploy.search.prompt import InputStage, Prompted
from passdeploy.targets import Target

SIZE = (3, 16, 16)
CPU = Target("cpu", "test", None, "onnxruntime", "fp32", 1, 1, True)
A100 = Target("a100", "NVIDIA A100", "8.0", "tensorrt_rtx", "fp16", 1, 1, False)


class Net(nn.Module):
    """Residual add, depthwise convolution, squeeze-and-excite, layer norm: what engines fuse in different ways."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.inner = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16), nn.Hardswish())
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 16, 1), nn.Sigmoid())
        self.down = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        inner = self.inner(x)
        x = x + inner * self.gate(inner)
        return self.head(self.norm(torch.relu(self.down(x)).mean((2, 3))))


@dataclass(frozen=True)
class Case:
    """The network, its ONNX file, images and what PyTorch computes for them."""

    model: nn.Module
    onnx: Path
    images: np.ndarray
    logits: np.ndarray

    @property
    def source(self) -> CompileInput:
        return CompileInput(self.onnx, samples=self.images)


def make_case(folder: Path, batch: int) -> Case:
    torch.manual_seed(0)
    model = Prompted(InputStage(Preprocess(SIZE[1:], (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)), "additive", 2), Net()).eval()
    assert model.stage.prompt is not None
    nn.init.normal_(model.stage.prompt, std=0.3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
    images = torch.rand(12, *SIZE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(images).numpy()
    path = export_onnx(model, folder / f"batch{batch}.onnx", SIZE, batch)
    return Case(model, path, images.numpy(), logits)


@pytest.fixture(scope="session")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("engines"), 1)


@pytest.fixture(scope="session")
def case4(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("engines"), 4)


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """max|a-b| / max|a|."""
    return float(np.abs(a - b).max() / np.abs(a).max())
