"""Starts a Triton server on loopback: the one on PATH (a container's), or the one of `scripts/serve-env.sh`."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from passdeploy.errors import BadInput, PassdeployError, Unavailable

ROOT = Path(__file__).resolve().parents[3]
READY_S = 60
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""To this machine itself: a proxy that the environment names could not reach it."""
HOW = "run scripts/serve-env.sh, or work inside NVIDIA's Triton container"


def environment() -> Path:
    """Where `scripts/serve-env.sh` puts a server: PASSDEPLOY_SERVE_ENV, else .venv-serve beside the source."""
    return Path(os.environ.get("PASSDEPLOY_SERVE_ENV", ROOT / ".venv-serve"))


def missing() -> str | None:
    """Why no server can be started; None when one can."""
    if (environment() / "complete").is_file() or shutil.which("tritonserver"):
        return None
    return f"no tritonserver on PATH and none in {environment()}; {HOW}"


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        http: host:port of its HTTP endpoint.
        grpc: host:port of its gRPC endpoint.
        process: The server's.
    """

    http: str
    grpc: str
    process: subprocess.Popen[bytes]

    def post(self, path: str, body: bytes = b"{}") -> tuple[int, str]:
        """An HTTP POST, such as ``v2/repository/models/NAME/load``: (status, body)."""
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://{self.http}/{path}", body, headers, method="POST")
        try:
            with _DIRECT.open(request, timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError as error:
            raise PassdeployError(f"serve: the server does not answer ({error})") from None


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for held in sockets:
            held.bind(("127.0.0.1", 0))
        return [held.getsockname()[1] for held in sockets]


def _refuse_taken(port: int) -> None:
    """Another server on it would answer in place of ours."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # of one that has just ended, nothing is left
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            raise BadInput(f"serve: port {port} cannot be used ({error}); give another --http-port") from None


def _ready(url: str) -> bool:
    try:
        with _DIRECT.open(f"http://{url}/v2/health/ready", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _command() -> tuple[list[str], dict[str, str]]:
    """The program with its fixed arguments, and its environment."""
    env, variables = environment(), dict(os.environ)
    if not (env / "complete").is_file():
        found = shutil.which("tritonserver")
        if found is None:
            raise Unavailable(f"serve: {missing()}")
        return [found], variables
    # The embedded Python must find its own packages, not those of the process that starts the server.
    for name in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"):
        variables.pop(name, None)
    variables["PATH"] = f"{env / 'bin'}:{os.environ.get('PATH', '')}"
    variables["LD_LIBRARY_PATH"] = (env / "triton/library_path").read_text().strip()
    variables["OMP_WAIT_POLICY"] = "passive"
    return [str(env / "triton/bin/tritonserver"), f"--backend-directory={env / 'triton/backends'}"], variables


@contextlib.contextmanager
def triton(repository: Path, log: Path, load: tuple[str, ...] = (), ports: tuple[int, ...] = ()) -> Iterator[Server]:
    """Runs tritonserver on loopback, models loaded and unloaded on request; stopped on exit.

    Args:
        repository: Model repository.
        log: Gets the server's output.
        load: Models to load at the start.
        ports: Of HTTP, gRPC and metrics; empty: free ones.

    Raises:
        Unavailable: There is no server here.
        BadInput: Another process listens on one of the ports.
        PassdeployError: It does not get ready; its reason, in one line.
    """
    command, variables = _command()
    for port in ports:
        _refuse_taken(port)
    ports = ports or tuple(free_ports(3))
    command += [f"--model-repository={repository}", "--model-control-mode=explicit"]
    command += ["--exit-timeout-secs=3"]  # after a failed reload it would wait half a minute for a model that is gone
    for name, port in zip(("http", "grpc", "metrics"), ports, strict=True):
        command += [f"--{name}-address=127.0.0.1", f"--{name}-port={port}"]
    command += [f"--load-model={name}" for name in load]
    with log.open("wb") as output:
        process = _start(command, variables, output)
    server = Server(f"127.0.0.1:{ports[0]}", f"127.0.0.1:{ports[1]}", process)
    try:
        deadline = time.monotonic() + READY_S
        while process.poll() is not None or not _ready(server.http):
            if process.poll() is not None or time.monotonic() > deadline:
                raise PassdeployError(f"serve: tritonserver did not get ready: {_reason(log)}")
            time.sleep(0.1)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _start(command: list[str], variables: dict[str, str], output: IO[bytes]) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=variables)
    except OSError as error:
        raise Unavailable(f"serve: {command[0]} cannot be started ({error.strerror or error}); {HOW}") from None


def _reason(log: Path) -> str:
    """The first error that a server's log tells, else its last line."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    told = next((line for line in lines if line.startswith(("E1", "E0", "error"))), lines[-1] if lines else "no output")
    return told[:400]
