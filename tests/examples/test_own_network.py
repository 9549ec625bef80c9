"""The example of one's own network and pictures: its parts; the whole run is tested with the pipeline."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from passdeploy import data as datasets
from passdeploy import models
from passdeploy.config import make_config
from passdeploy.config_file import load_file
from passdeploy.data.base import ImageData
from passdeploy.groups import find_groups
from passdeploy.search.prompt import InputStage, Prompted
from passdeploy.training import TrainSettings, evaluate, train

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_network"


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> ImageData:
    folder = tmp_path_factory.mktemp("own") / "shapes"
    subprocess.run([sys.executable, EXAMPLE / "make_data.py", folder], check=True, capture_output=True)
    return datasets.load(str(folder))


@pytest.fixture
def net(monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    monkeypatch.chdir(EXAMPLE)
    monkeypatch.syspath_prepend(str(EXAMPLE))
    torch.manual_seed(0)
    return models.build("nets:build", 3)


def test_the_pictures(shapes: ImageData) -> None:
    assert shapes.classes == ("disc", "square", "triangle")
    assert shapes.input_shape == (3, 48, 40)
    assert len(shapes.train) + len(shapes.val) + len(shapes.test) == 450


def test_the_configuration_is_valid(shapes: ImageData) -> None:
    config = make_config(load_file(EXAMPLE / "passdeploy.yaml"))
    assert config.model == "nets:build"
    assert config.data == "shapes"


def test_the_same_pictures_each_time(tmp_path: Path) -> None:
    write = runpy.run_path(str(EXAMPLE / "make_data.py"))["write"]
    write(tmp_path / "a", per_class=2)
    write(tmp_path / "b", per_class=2)
    for file in sorted((tmp_path / "a").rglob("*.png")):
        assert file.read_bytes() == (tmp_path / "b" / file.relative_to(tmp_path / "a")).read_bytes()


def test_what_can_be_pruned(net: torch.nn.Module) -> None:
    groups = find_groups(net.eval(), torch.rand(1, 3, 48, 40))
    assert sum(group.kind == "depth" for group in groups.groups) == 3
    assert sum(group.kind == "channel" for group in groups.groups) >= 6
    assert not groups.frozen or set(groups.frozen) == {"head"}


def test_it_can_be_learnt(net: torch.nn.Module, shapes: ImageData) -> None:
    model = Prompted(InputStage(shapes.preprocess), net)
    train(model, shapes, TrainSettings(epochs=4, batch=32, lr=0.03))
    assert evaluate(model, shapes.test) > 0.7
