"""`python -m passdeploy.shipping.serve` without a Triton: how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from passdeploy.shipping.repository import write_repository


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_server_is_not_left_behind(sealed_bundle: Path, tmp_path: Path) -> None:
    """A service manager or `timeout` sends SIGTERM."""
    write_repository(tmp_path / "models", sealed_bundle, "triton", name="net", kind="python")
    tools, scratch, told = tmp_path / "tools", tmp_path / "scratch", tmp_path / "pid"
    for folder in (tools, scratch):
        folder.mkdir()
    (tools / "tritonserver").write_text(f"#!/bin/sh\necho $$ > {told}.new; mv {told}.new {told}; exec sleep 60\n")
    (tools / "tritonserver").chmod(0o755)
    variables = os.environ | {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "PASSDEPLOY_SERVE_ENV": str(tmp_path / "none"),
        "TMPDIR": str(scratch),
    }
    command = [sys.executable, "-m", "passdeploy.shipping.serve", str(tmp_path / "models")]
    with subprocess.Popen(command, env=variables, stderr=subprocess.PIPE) as serving:
        deadline = time.monotonic() + 60
        while not told.exists():
            assert serving.poll() is None, serving.stderr and serving.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        serving.send_signal(signal.SIGTERM)
        assert serving.wait(30) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int(told.read_text()), 0)
    assert not list(scratch.iterdir())
