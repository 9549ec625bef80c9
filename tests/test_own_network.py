"""The example of one's own network and pictures, from its factory to a bundle, on the real ONNX Runtime."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from passdeploy.workspace import read_json

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "own_network"
CONFIG = """
model: nets:build
data: shapes
latency: 1.2x
train_batch: 32
epochs: 0.5
seed: 3
profile: {seconds: 2, structures: 12}
dense: {epochs: 1, min_steps: 12}
search: {epochs: 0.5, min_steps: 24}
finetune: {min_steps: 10}
"""
STAGES = ("dense", "profile", "search", "alternatives", "fit", "finetune", "compile", "bench", "report", "ship")


def call(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A fresh process in the user's folder, where only the user's own modules are on the path."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The user's folder, after the run."""
    folder = tmp_path_factory.mktemp("own")
    runpy.run_path(str(EXAMPLE / "make_data.py"))["write"](folder / "shapes", per_class=40)
    (folder / "nets.py").write_text((EXAMPLE / "nets.py").read_text())
    (folder / "passdeploy.yaml").write_text(CONFIG)
    done = call(folder, "-m", "passdeploy", "run", "--out", "run")
    # A busy machine may be measured slower than asked; whatever the verdict, every stage has run.
    assert done.returncode in (0, 1), done.stderr
    assert "Configuration: ./passdeploy.yaml" in done.stderr
    assert "No weights given" in done.stderr
    assert "Traceback" not in done.stderr
    return folder


def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = read_json(folder / "run" / "report.json")
    return found


def test_all_stages_ran(folder: Path) -> None:
    manifest = json.loads((folder / "run" / "manifest.json").read_text())["stages"]
    assert set(manifest) == set(STAGES)
    assert report(folder)["status"] in ("within_budget", "over_budget")
    assert (folder / "run" / "bundle" / "SHA256SUMS").exists()


def test_proven_equal(folder: Path) -> None:
    proof = report(folder)["equivalence"]
    for step in ("masked_vs_thin", "thin_vs_onnx", "onnx_vs_engine"):
        assert proof[step] <= 1e-4, step
    assert proof["top1_agreement"] == 1.0


def test_it_is_smaller(folder: Path) -> None:
    got = report(folder)
    assert got["pruned"]["macs"] < got["dense"]["macs"]
    assert got["pruned"]["params"] < got["dense"]["params"]
    assert [s["images"] for s in got["provenance"]["splits"].values()] != [0, 0, 0]


def test_loaded_again_in_a_fresh_process(folder: Path) -> None:
    """`passdeploy.load(dir, model=build)` is the very network that was shipped: its outputs are the bundle's."""
    script = (
        "import numpy as np, torch, passdeploy, nets\n"
        "from safetensors.torch import load_file\n"
        "from passdeploy.data.base import Preprocess\n"
        "from passdeploy.search.prompt import InputStage, Prompted\n"
        "import json\n"
        "thin = passdeploy.load('run', model=nets.build)\n"
        "facts = json.load(open('run/bundle/bundle.json'))['preprocess']\n"
        "how = Preprocess((48, 40), mean=tuple(facts['mean']), std=tuple(facts['std']))\n"
        "stage = InputStage(how, 'additive')\n"
        "stage.load_state_dict(load_file('run/prompt.safetensors'))\n"
        "images = torch.from_numpy(np.load('run/bundle/samples/images.npy'))\n"
        "with torch.no_grad():\n"
        "    one, two = (Prompted(stage, m).eval()(images) for m in (thin, passdeploy.load('run', model=nets.build)))\n"
        "assert torch.equal(one, two)\n"
        "np.save('again.npy', one.numpy())\n"
        "passdeploy.load('run')\n"  # without its factory it says what is missing
    )
    done = call(folder, "-c", script)
    assert done.stderr.rstrip().endswith("give its factory: load(dir, model=build)"), done.stderr
    outputs = np.load(folder / "run" / "bundle" / "samples" / "outputs.npy")
    again = np.load(folder / "again.npy")
    assert np.abs(again - outputs).max() <= 1e-4 * np.abs(outputs).max()


def test_the_bundle_verifies(folder: Path) -> None:
    done = call(folder, "-m", "passdeploy", "verify", "run/bundle", "--json")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_same_through_python(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network as an object, with the caller's weights: its groups and operators are found as by name."""
    from passdeploy.config import make_config
    from passdeploy.subject import load_subject

    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    by_name = load_subject(make_config({"model": "nets:build", "data": str(folder / "shapes")}))
    network = by_name.build()
    as_object = load_subject(make_config({"model": "<OwnNet>", "data": str(folder / "shapes")}), model=network)
    assert as_object.groups.units == by_name.groups.units
    assert as_object.weights is not None
    assert by_name.weights is None
    for name, tensor in network.state_dict().items():
        assert torch.equal(as_object.network.state_dict()[name], tensor)
