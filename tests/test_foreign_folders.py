"""A folder that some other program works in is neither taken for a run directory nor deleted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from passdeploy.api import run_stage
from passdeploy.config import make_config
from passdeploy.config_file import load_file
from passdeploy.errors import BadInput
from passdeploy.workspace import Workspace, is_run_directory
from tests import scripted

FOREIGN = {
    "lightning": ("config.yaml", "seed_everything: 0\ntrainer: {max_epochs: 3}\nmodel: resnet\ndata: photos\n"),
    "hydra": ("config.yaml", "defaults: [base]\nlatency: 2x\ntarget: cpu\n"),
    "a list": ("config.yaml", "- one\n- two\n"),
    "not yaml": ("config.yaml", "a: [b\n"),
    "not text": ("config.yaml", "\x00"),
    "hand-written": ("config.yaml", "target: cpu\nlatency: 2x\nmodel: resnet20\n"),
    "web app": ("manifest.json", '{"name": "app", "icons": []}'),
    "list of files": ("manifest.json", '["a", "b"]'),
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("fresh", [True, False])
def test_a_foreign_folder_stays_as_it_is(tmp_path: Path, kind: str, fresh: bool) -> None:
    name, text = FOREIGN[kind]
    (tmp_path / name).write_text(text)
    (tmp_path / "best.ckpt").write_text("weeks")
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}
    with pytest.raises(BadInput, match="not a run directory") as refused:
        scripted.start(tmp_path, fresh=fresh)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before
    if not fresh:
        assert "--fresh" not in str(refused.value), "which would delete it"


def test_run_directories_are_known(tmp_path: Path) -> None:
    assert not is_run_directory(tmp_path)
    written = make_config({"model": "resnet20", "data": "stripes"}).to_json()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(written))
    assert is_run_directory(tmp_path)
    # Of another version, whose configuration has other keys: its list of stages says whose it is.
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(written | {"an_old_key": 1}))
    assert not is_run_directory(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"schema": "passdeploy.manifest/1", "stages": {}}))
    assert is_run_directory(tmp_path)
    Workspace(tmp_path).clear()
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_configuration_may_be_started_over(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"schema": "passdeploy.manifest/1", "stages": {}}))
    (tmp_path / "config.yaml").write_text("- a\n")
    with pytest.raises(BadInput, match=r"config\.yaml: can no longer be read .*--fresh"):
        scripted.start(tmp_path)
    scripted.start(tmp_path, fresh=True)


def test_a_run_of_an_earlier_version_is_gone_on_with(copied: Callable[[], Path]) -> None:
    """Keys that it does not know stand at their defaults; where a default is another one now, that is said."""
    folder = copied()
    written = load_file(folder / "config.yaml")
    hyper_every = written["search"].pop("hyper_every")
    (folder / "config.yaml").write_text(yaml.safe_dump(written))
    scripted.start(folder, weights=written["weights"])
    (folder / "config.yaml").write_text(yaml.safe_dump(written))
    assert run_stage("fit", folder, quiet=True) == [folder / "fit"]
    written["search"]["hyper_every"] = hyper_every + 1
    (folder / "config.yaml").write_text(yaml.safe_dump(written))
    with pytest.raises(
        BadInput, match=r"search\.hyper_every\); a default may have changed .* put the old value into the conf"
    ):
        scripted.start(folder, weights=written["weights"])
    with pytest.raises(BadInput, match=r"\(differs in: search\.hyper_every, seed\); give another --out"):
        scripted.start(folder, weights=written["weights"], seed=1)
