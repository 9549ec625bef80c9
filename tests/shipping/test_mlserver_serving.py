"""A real MLServer process on loopback serves a bundle over the V2 protocol."""

from __future__ import annotations

import json
import os
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from passdeploy.shipping.repository import write_repository
from passdeploy.shipping.runner import load
from passdeploy.shipping.servers.process import environment, free_ports
from tests.shipping.conftest import SHAPE
from tests.shipping.serving import missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


def post(url: str, body: dict[str, object]) -> tuple[int, dict[str, object]]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.fixture(scope="module")
def model_url(sealed_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("mlserver")
    told = write_repository(folder / "models", sealed_bundle, "mlserver", name="net")
    assert told.start == f"mlserver start {folder / 'models'}"
    ports = free_ports(3)
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"MLSERVER_HOST": "127.0.0.1"}
    for name, port in zip(("HTTP", "GRPC", "METRICS"), ports, strict=True):
        variables[f"MLSERVER_{name}_PORT"] = str(port)
    url = f"http://127.0.0.1:{ports[0]}/v2/models/net"
    command = [str(environment() / "bin/mlserver"), "start", str(folder / "models")]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=variables, cwd=folder)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"{url}/ready", timeout=5)
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    pytest.fail(f"MLServer is not ready:\n{(folder / 'log').read_text()[-3000:]}")
                time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def test_answers_are_the_runners(model_url: str, sealed_bundle: Path) -> None:
    images = np.random.default_rng(4).random((6, *SHAPE), dtype=np.float32)
    tensor = {"name": "images", "shape": list(images.shape), "datatype": "FP32", "data": images.ravel().tolist()}
    status, body = post(f"{model_url}/infer", {"inputs": [tensor]})
    assert status == 200, body
    (output,) = body["outputs"]  # type: ignore[misc]
    with load(sealed_bundle) as model:
        expected = model.run(images)
    answer = np.array(output["data"], np.float32).reshape(output["shape"])
    assert answer.shape == expected.shape
    assert np.max(np.abs(answer - expected)) <= 1e-5 * np.max(np.abs(expected))


def test_wrong_images_get_the_runners_reason(model_url: str) -> None:
    tensor = {"name": "images", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}
    status, body = post(f"{model_url}/infer", {"inputs": [tensor]})
    assert status == 400
    assert "expected float32 [n, 3, 12, 10]" in str(body["error"])
