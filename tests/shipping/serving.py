"""The client's side of the serving tests and of `benchmarks/soak.py`, in the environment of the server."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from passdeploy.shipping.servers.process import ROOT, environment


def missing() -> str | None:
    """Why there is no environment with a server and its clients."""
    if (environment() / "complete").is_file():
        return None
    return f"no Triton server in {environment()}; run scripts/serve-env.sh"


def client(*arguments: str, timeout: float = 120) -> str:
    """Runs `serving_client.py` in the server's environment, where tritonclient is; returns what it printed."""
    command = [str(environment() / "bin/python"), str(Path(__file__).with_name("serving_client.py")), *arguments]
    variables = os.environ | {"PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=timeout)
    if done.returncode != 0:
        raise RuntimeError(f"client: {done.stderr[-3000:]}")
    return done.stdout
