"""`make soak`: 100,000 requests, 16 at a time, two bundles swapped 20 times."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from passdeploy.shipping.servers.process import ROOT
from tests.shipping.serving import missing


@pytest.mark.soak
@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_no_error_and_no_wrong_answer(tmp_path: Path) -> None:
    out = tmp_path / "soak.json"
    command = [sys.executable, str(ROOT / "benchmarks/soak.py"), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    told = json.loads(out.read_text())
    assert told["problems"] == []
    assert told["requests"] >= 100_000
    assert told["swaps"] == 20
    assert min(told["answered_by"]) > 0
