"""`python -m passdeploy.shipping.serve` without a Triton: how it ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from passdeploy.errors import BadInput
from passdeploy.shipping.repository import write_repository
from passdeploy.shipping.servers import process


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


def test_a_port_that_another_server_has_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would answer in place of ours."""
    monkeypatch.setattr(process, "_command", lambda: (["false"], dict(os.environ)))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        refused = pytest.raises(BadInput, match=f"port {port} cannot be used .*give another --http-port")
        with refused, process.triton(tmp_path, tmp_path / "log", ports=(port, port + 1, port + 2)):
            pass
