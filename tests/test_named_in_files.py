"""A name found in the file of a run directory is never imported: the caller gives it again."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from passdeploy.api import run_stage
from passdeploy.config import make_config
from passdeploy.errors import BadInput
from passdeploy.plugins import load_attribute

MODULE = "passdeploy_test_planted"


@pytest.mark.parametrize("key", ["model", "data"])
def test_a_planted_name_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    (tmp_path / f"{MODULE}.py").write_text("def planted(*_, **__): raise SystemExit('imported')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    values = {"model": "resnet20", "data": "fashion-mnist", key: f"{MODULE}:planted"}
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump(make_config(values).to_json()))
    with pytest.raises(BadInput, match=f"its {key} is the caller's own; give it again with --{key} {MODULE}:planted"):
        run_stage("search", run, quiet=True)
    assert MODULE not in sys.modules
    with pytest.raises(BadInput, match="SystemExit: imported"):  # as a name that the caller gives it is
        run_stage("search", run, quiet=True, **{key: f"{MODULE}:planted"})  # type: ignore[arg-type]


def test_another_one_than_the_runs_is_refused(tmp_path: Path, single: Path) -> None:
    with pytest.raises(BadInput, match=r"another configuration \(differs in: data\)"):
        run_stage("fit", single, quiet=True, data="fashion-mnist")


def test_what_a_module_needs_is_not_the_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the names begin alike."""
    (tmp_path / "nosuch_nets.py").write_text("import nosuch\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(BadInput, match="nosuch_nets needs 'nosuch', which is not installed"):
        load_attribute("nosuch_nets:build", "--model")
    for spec in ("nosuch:build", "nosuch.nets:build"):
        with pytest.raises(BadInput, match="no module 'nosuch"):
            load_attribute(spec, "--model")
