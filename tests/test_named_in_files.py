"""A name found in the file of a run directory is never imported: the caller gives it again."""

from __future__ import annotations

import subprocess
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


@pytest.mark.parametrize(
    ("written", "start_in", "hint"),
    [
        ("nets.py", None, "give nets:build"),
        ("./nets.py", None, "give nets:build"),
        ("families/nets.py", None, "give families.nets:build"),
        ("{here}/families/nets.py", None, "give families.nets:build"),
        ("families/nets", None, "give families.nets:build"),
        ("my-nets/nets.py", "my-nets", "start in {here}/my-nets and give nets:build"),
        ("../other/nets.py", "../other", "start in {here.parent}/other and give nets:build"),
    ],
)
def test_a_path_is_told_how_it_is_given_as_a_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str, start_in: str | None, hint: str
) -> None:
    here = tmp_path / "here"
    for folder in (here, here / "families", here / "my-nets", tmp_path / "other"):
        folder.mkdir()
        (folder / "nets.py").write_text("def build(): return __file__\n")
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    with pytest.raises(BadInput, match="is a path, not a module; ") as refused:
        load_attribute(f"{written.format(here=here)}:build", "--model")
    assert "nets" not in sys.modules, "refused before anything is imported"
    assert str(refused.value).endswith(hint.format(here=here))
    monkeypatch.chdir(here / (start_in or "."))
    file = load_attribute(hint.split()[-1], "--model")()
    assert Path(file).resolve() == (here / written.format(here=here)).with_suffix(".py").resolve()


def test_a_module_may_import_torchvision_that_was_built_for_another_pytorch() -> None:
    """As PyPI's is beside a CPU build; in a process of its own, since an import that worked once works again."""
    call = "load_attribute('torchvision.models:resnet18', '--model')"
    code = f"from passdeploy.plugins import load_attribute; print({call})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "resnet18" in done.stdout, done.stderr
