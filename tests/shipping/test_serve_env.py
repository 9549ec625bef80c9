"""`scripts/serve-env.sh`: what it sets up lies in a folder of its own."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "serve-env.sh"


pytestmark = pytest.mark.skipif(
    os.uname().sysname != "Linux" or os.uname().machine != "x86_64", reason="tritonserver is not packed for it"
)


@pytest.mark.parametrize("name", ["mine.txt", "pyvenv.cfg"])
def test_a_folder_of_something_else_is_left_alone(name: str, tmp_path: Path) -> None:
    """Another environment of Python, too."""
    (tmp_path / name).write_text("mine")
    done = subprocess.run(["sh", str(SCRIPT), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2 and "name another folder" in done.stderr
    assert (tmp_path / name).read_text() == "mine"


def test_the_interpreter_that_was_named_is_taken_or_refused(tmp_path: Path) -> None:
    """Never another one in its place."""
    other = tmp_path / "python3.13"
    other.write_text("#!/bin/sh\necho 3.13\n")
    other.chmod(0o755)
    for python in (other, tmp_path / "nowhere"):
        environment = {**os.environ, "PYTHON": str(python)}
        command = ["sh", str(SCRIPT), str(tmp_path / "made")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (
            2,
            f"serve-env: needs Python 3.11 or 3.12, tried {python} (set PYTHON)\n",
        )
        assert not (tmp_path / "made").exists()
