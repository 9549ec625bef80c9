"""The code in docs/own-model.md and docs/own-data.md runs as it is written; the workflow files are valid."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from passdeploy import data as datasets
from passdeploy import models
from passdeploy.data.base import ImageData
from passdeploy.feeding import training_batches

ROOT = Path(__file__).parents[1]


def python_blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)


def as_module(block: str, folder: Path) -> None:
    """Writes a block into the file that its first line names."""
    name = block.splitlines()[0].removeprefix("# ")
    (folder / name).write_text(block)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_own_model(here: Path) -> None:
    (block,) = python_blocks("own-model.md")
    as_module(block, here)
    model = models.build("nets:build", 7).eval()
    assert model(torch.rand(2, 3, 32, 24)).shape == (2, 7)


def test_own_data(here: Path) -> None:
    (block,) = python_blocks("own-data.md")
    as_module(block, here)
    data = datasets.load("mydata:load")
    assert isinstance(data, ImageData)
    assert len(data.train) + len(data.val) == 240
    assert data.input_shape == (3, 32, 32)
    _, images, labels = next(training_batches(data, batch=16, seed=0, total=1))
    assert images.shape == (16, 3, 32, 32)
    assert labels.max() < data.num_classes


def test_workflows_fit_githubs_schema() -> None:
    files = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    assert files
    command = [
        sys.executable,
        "-m",
        "check_jsonschema",
        "--builtin-schema",
        "vendor.github-workflows",
        *map(str, files),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_checkout_of_a_fork_never_runs_on_our_gpu() -> None:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    own = {name: job for name, job in jobs.items() if "self-hosted" in job["runs-on"]}
    assert own
    for job in own.values():
        assert "head.repo.full_name == github.repository" in job["if"]


def test_continuous_integration_calls_make_test() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert re.search(r"^make test\b", script, re.MULTILINE)
    assert subprocess.run(["bash", "-n", str(ROOT / ".ci" / "run")]).returncode == 0
