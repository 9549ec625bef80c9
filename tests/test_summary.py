"""What the command line prints at the end of a run."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from passdeploy.config import make_config
from passdeploy.errors import BadInput
from passdeploy.latency.measurement import Comparison, Measurement
from passdeploy.layers import LayerTimes
from passdeploy.summary import bench_table, layer_table, network_groups, offered, render
from tests.reporting.variants import variant


@pytest.mark.parametrize(("status", "shipped"), [("within_budget", True), ("infeasible", False)])
def test_only_files_that_are_there_are_named(tmp_path: Path, status: str, shipped: bool) -> None:
    (tmp_path / "report.html").touch()
    if shipped:
        (tmp_path / "bundle").mkdir()
    assert offered(tmp_path) == [tmp_path / "report.html", *([tmp_path / "bundle"] if shipped else [])]
    console = Console(width=500)
    with console.capture() as captured:
        console.print(render(variant(status)))
    assert status in captured.get()


def test_names_are_no_markup() -> None:
    name = "exp[1][/b]/a.onnx"
    measured = Measurement(1.0, 1.0, None, mean=1.0, n=1, spread=0.0, blocks=1, disturbed=0, samples=(1.0,))
    console = Console(width=500)
    with console.capture() as captured:
        console.print(bench_table(Comparison({name: measured}, {}, name)))
        console.print(layer_table([name], [LayerTimes("part[0]", (1.0,))]))
    assert captured.get().count(name) == 2 and "part[0]" in captured.get()


NETWORKS = """
import torch
from torch import nn


def body(*head):
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), *head)


def needs_classes(num_classes):
    return body(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))


def only_32():
    return body(nn.Flatten(), nn.Linear(8 * 32 * 32, 7))


def only_48():
    return body(nn.Flatten(), nn.Linear(8 * 48 * 48, 7))


def of_pixels(num_classes=5):
    return body(nn.Conv2d(8, num_classes, 1))
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module with the user's networks."""
    name = "blank_image_networks"
    (tmp_path / f"{name}.py").write_text(NETWORKS)
    monkeypatch.syspath_prepend(tmp_path)
    return name


@pytest.mark.parametrize(
    ("function", "size", "classes"),
    [("needs_classes", (224, 224), 1000), ("only_32", (32, 32), 7), ("of_pixels", (224, 224), 5)],
)
def test_groups_of_ordinary_networks_without_data(own: str, function: str, size: tuple[int, int], classes: int) -> None:
    found = network_groups(make_config({"model": f"{own}:{function}", "data": None}))
    assert found.data.preprocess.size == size
    assert found.data.num_classes == classes
    assert found.groups.groups
    assert found.task.name == ("segmentation" if function == "of_pixels" else "classification")


def test_a_network_that_takes_no_blank_image_asks_for_its_size(own: str) -> None:
    config = make_config({"model": f"{own}:only_48", "data": None})
    with pytest.raises(BadInput, match=r"takes no blank images .*; give --data, or input_size in the configuration"):
        network_groups(config)
    assert network_groups(config.model_copy(update={"input_size": (48, 48)})).groups.groups
