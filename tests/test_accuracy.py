"""What stands in for the accuracy of an engine that can't run here."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import nn

from passdeploy.engines.base import CompileInput, Engine
from passdeploy.errors import BadInput
from passdeploy.export import export_onnx
from passdeploy.pipeline import Run
from passdeploy.stages.accuracy import EngineAccuracy, accuracy_in_precision
from passdeploy.targets import Target
from passdeploy.tasks import get_task
from tests import scripted

ENGINE = Engine("tensorrt_rtx", b"", ".tensorrt_rtx", {})


class Loud(nn.Module):
    """Three 1x1 convolutions; the middle of it is as large as the first weight says."""

    def __init__(self, size: float) -> None:
        super().__init__()
        for name, value in (("first", size), ("middle", 3.0), ("last", 1e-4)):
            layer = nn.Conv2d(3, 3, 1, bias=False)
            nn.init.constant_(layer.weight, value)
            setattr(self, name, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.middle(torch.relu(self.first(x))))).mean((2, 3))


def judged(folder: Path, size: float, precision: str) -> EngineAccuracy | None:
    data = scripted.data()
    path = export_onnx(Loud(size), folder / "model.onnx", data.input_shape)
    source = CompileInput(path, samples=data.val.images(torch.arange(8)).numpy())
    run = cast(Run, SimpleNamespace(subject=SimpleNamespace(data=data, task=get_task("classification"))))
    target = Target("a100", "NVIDIA A100", "8.0", "tensorrt_rtx", precision, 1, 1, attached=False)
    return accuracy_in_precision(run, ENGINE, source, target)


def test_a_graph_that_overflows_on_its_gpu_is_not_judged_by_what_it_computes_here(tmp_path: Path) -> None:
    found = judged(tmp_path, 1.0, "fp16")
    assert found is not None and found.of == "graph"
    with pytest.raises(BadInput, match=r"fp16: .* half ends at 65504; use --precision bf16"):
        judged(tmp_path, 3e4, "fp16")


def test_nothing_here_computes_bf16(tmp_path: Path) -> None:
    assert judged(tmp_path, 3e4, "bf16") is None
