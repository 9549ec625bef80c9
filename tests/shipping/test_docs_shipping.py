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
    program, *arguments = shlex.split(line, comments=True)
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


def serving(page: str) -> list[str]:
    """The commands that ship and serve, without the one that sets up a server."""
    blocks = [block.strip().splitlines() for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL)]
    (block,) = [block for block in blocks if any("--server triton" in line for line in block)]
    return [line for line in block if not line.startswith("scripts/")]


@pytest.mark.parametrize("page", ["README.md", "docs/shipping.md"])
def test_serving(here: Path, page: str) -> None:
    ship, serve = serving((ROOT / page).read_text())
    run(ship)
    if missing() is None:
        assert "4 sample images answered" in run(serve)
