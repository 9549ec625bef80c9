"""The code in docs/shipping.md, and the two commands of the README, run as they are written."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from passdeploy.shipping.servers.process import ROOT
from tests.shipping.serving import missing

PAGE = (ROOT / "docs" / "shipping.md").read_text()
BASH = [block.strip().splitlines() for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)]
PYTHON = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def here(sealed_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with ``bundle`` and a run ``runs/demo``, whose bundle is a small one."""
    for place in ("bundle", "runs/demo/bundle"):
        shutil.copytree(sealed_bundle, tmp_path / place)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path


def run(line: str) -> str:
    program, *arguments = shlex.split(line)
    if program == "passdeploy":
        command = [sys.executable, "-c", "from passdeploy.cli import main; main()", *arguments]
    else:
        command = [sys.executable if program == "python" else program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{line}: {done.stderr}{done.stdout}"
    return done.stdout


def test_verify(here: Path) -> None:
    for line in BASH[0]:
        assert "passed" in run(line)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_signing_with_keys_of_openssl(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("model_signing", reason="pip install 'passdeploy[sign]'")
    for line in BASH[1]:
        run(line)
    exec(PYTHON[0], {})
    said = capsys.readouterr().out
    assert said.startswith("True ")
    assert "tampering would have been detected" in said


def test_the_runner(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exec(PYTHON[1], {})
    assert capsys.readouterr().out.count(",") == 4, "five class names"


@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_serving(here: Path) -> None:
    ship, serve = BASH[2]
    run(ship)
    assert "4 sample images answered" in run(serve)


@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_the_readmes_two_commands(here: Path) -> None:
    section = (ROOT / "README.md").read_text().split("## From a run to a served answer")[1]
    ship, serve = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)[0].strip().splitlines()
    run(ship)
    assert "4 sample images answered" in run(serve)
