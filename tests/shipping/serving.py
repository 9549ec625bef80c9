"""Starts the real Triton server that `scripts/serve-env.sh` sets up, for tests and for `benchmarks/soak.py`."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
READY_S = 60


def environment() -> Path:
    """Where `scripts/serve-env.sh` puts it."""
    return Path(os.environ.get("PASSDEPLOY_SERVE_ENV", ROOT / ".venv-serve"))


def missing() -> str | None:
    """Why no server can be started; None when one can."""
    if not (environment() / "complete").is_file():
        return f"no Triton server in {environment()}; run scripts/serve-env.sh (make serve-env)"
    return None


@dataclass(frozen=True)
class Server:
    """A running server."""

    http: str
    grpc: str
    process: subprocess.Popen[bytes]
    log: Path

    def post(self, path: str) -> tuple[int, str]:
        """An empty HTTP POST, such as ``v2/repository/models/NAME/load``: (status, body)."""
        request = urllib.request.Request(f"http://{self.http}/{path}", data=b"{}", method="POST")
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for held in sockets:
            held.bind(("127.0.0.1", 0))
        return [held.getsockname()[1] for held in sockets]


def _ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://{url}/v2/health/ready", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@contextlib.contextmanager
def triton(repository: Path, log: Path, load: tuple[str, ...] = ()) -> Iterator[Server]:
    """Runs tritonserver on loopback, models loaded and unloaded on request; stopped on exit.

    Args:
        repository: Model repository.
        log: Gets the server's output.
        load: Models to load at the start.
    """
    env = environment()
    ports = free_ports(3)
    command = [str(env / "triton/bin/tritonserver"), f"--model-repository={repository}"]
    command += [f"--backend-directory={env / 'triton/backends'}", "--model-control-mode=explicit"]
    command += ["--exit-timeout-secs=3"]  # after a failed reload it would wait half a minute for a model that is gone
    for name, port in zip(("http", "grpc", "metrics"), ports, strict=True):
        command += [f"--{name}-address=127.0.0.1", f"--{name}-port={port}"]
    command += [f"--load-model={name}" for name in load]
    libraries = (env / "triton/library_path").read_text().strip()
    variables = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    variables |= {
        "PATH": f"{env / 'bin'}:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": libraries,
        "OMP_WAIT_POLICY": "passive",
    }
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=variables)
    server = Server(f"127.0.0.1:{ports[0]}", f"127.0.0.1:{ports[1]}", process, log)
    try:
        deadline = time.monotonic() + READY_S
        while not _ready(server.http):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"tritonserver is not ready:\n{log.read_text(errors='replace')[-4000:]}")
            time.sleep(0.1)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def client(*arguments: str, timeout: float = 120) -> str:
    """Runs `serving_client.py` in the server's environment, where tritonclient is; returns what it printed."""
    command = [str(environment() / "bin/python"), str(Path(__file__).with_name("serving_client.py")), *arguments]
    variables = os.environ | {"PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=timeout)
    if done.returncode != 0:
        raise RuntimeError(f"client: {done.stderr[-3000:]}")
    return done.stdout
