"""A folder that some other program works in is neither taken for a run directory nor deleted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from passdeploy.config import make_config
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
