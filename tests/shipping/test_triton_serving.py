"""A real tritonserver on loopback serves a bundle through the Python backend over our runner."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from passdeploy.shipping.bundle import write_bundle
from passdeploy.shipping.repository import write_repository
from passdeploy.shipping.runner import load
from passdeploy.shipping.servers.process import ROOT, Server, environment, triton
from tests.shipping.conftest import SHAPE, make_source
from tests.shipping.serving import client, missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("bundles")
    return tuple(  # type: ignore[return-value]
        write_bundle(folder / name / "bundle", make_source(folder / name / "run", seed=seed))
        for seed, name in enumerate("ab")
    )


@pytest.fixture(scope="module")
def repository(bundles: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve") / "models"
    assert write_repository(folder, bundles[0], "triton", name="net").kind == "python"
    return folder


@pytest.fixture(scope="module")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with triton(repository, tmp_path_factory.mktemp("log") / "triton.log", load=("net",)) as running:
        yield running


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_answers_are_the_runners(server: Server, bundles: tuple[Path, Path], tmp_path: Path, protocol: str) -> None:
    images = np.random.default_rng(11).random((50, *SHAPE), dtype=np.float32)
    np.save(tmp_path / "in.npy", images)
    url = server.http if protocol == "http" else server.grpc
    client("infer", protocol, url, "net", str(tmp_path / "in.npy"), str(tmp_path / "out.npy"))
    with load(bundles[0]) as model:
        expected = model.run(images)
    answer = np.load(tmp_path / "out.npy")
    assert answer.shape == expected.shape
    assert np.max(np.abs(answer - expected)) <= 1e-5 * np.max(np.abs(expected))


def test_reload_under_load_loses_no_request(server: Server, repository: Path, bundles: tuple[Path, Path]) -> None:
    a, b = map(str, bundles)
    told = json.loads(client("swap", server.http, server.grpc, str(repository), "net", a, b, "2000", "4", "8"))
    assert told["problems"] == []
    assert told["requests"] >= 2000
    assert told["swaps"] == 4
    assert min(told["answered_by"]) > 0, "both bundles answered, so bundles were swapped while requests came in"


def test_a_damaged_bundle_is_not_served_and_the_server_says_why(
    server: Server, bundles: tuple[Path, Path], repository: Path
) -> None:
    write_repository(repository, bundles[0], "triton", name="damaged")
    path = repository / "damaged/1/bundle/model.onnx"
    path.write_bytes(path.read_bytes()[:-1] + b"\x00\x01")
    status, body = server.post("v2/repository/models/damaged/load")
    assert status == 400
    assert "model.onnx: content does not match its digest in SHA256SUMS" in body
    shutil.rmtree(repository / "damaged")


def test_a_damaged_successor_leaves_the_old_one_serving(
    server: Server, bundles: tuple[Path, Path], repository: Path, tmp_path: Path
) -> None:
    write_repository(repository, bundles[0], "triton", name="steady")
    assert server.post("v2/repository/models/steady/load")[0] == 200
    write_repository(repository, bundles[1], "triton", name="steady")
    (repository / "steady/1/bundle/extra").write_text("x")
    status, body = server.post("v2/repository/models/steady/load")
    assert status == 400
    assert "extra: not listed in SHA256SUMS" in body
    images = np.random.default_rng(2).random((3, *SHAPE), dtype=np.float32)
    np.save(tmp_path / "in.npy", images)
    client("infer", "grpc", server.grpc, "steady", str(tmp_path / "in.npy"), str(tmp_path / "out.npy"))
    with load(bundles[0]) as model:
        assert np.allclose(np.load(tmp_path / "out.npy"), model.run(images), rtol=1e-4, atol=1e-5)
    assert server.post("v2/repository/models/steady/unload")[0] == 200
    shutil.rmtree(repository / "steady")


def test_two_commands_from_a_bundle_to_a_served_answer(bundles: tuple[Path, Path], tmp_path: Path) -> None:
    write_repository(tmp_path / "models", bundles[0], "triton", name="net")
    command = [sys.executable, "-m", "passdeploy.shipping.serve", str(tmp_path / "models"), "--once"]
    variables = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=variables)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("net: 4 sample images answered (")
    path = tmp_path / "models/net/1/bundle/model.onnx"
    path.write_bytes(path.read_bytes() + b"x")
    refused = subprocess.run(command, capture_output=True, text=True, env=variables)
    assert refused.returncode == 1
    assert refused.stderr == (
        "error: model.onnx: content does not match its digest in SHA256SUMS; get the bundle again\n"
    )


def test_the_configs_are_what_triton_reads(repository: Path, bundles: tuple[Path, Path], tmp_path: Path) -> None:
    """Triton's own protobuf, in the environment that has it; a typo must not pass."""
    write_repository(tmp_path / "k", bundles[0], "kserve", name="net")
    program = (
        "import sys; from pathlib import Path; from passdeploy.shipping.servers.triton_config import parse\n"
        "for path in sys.argv[1:]:\n"
        "    message = parse(Path(path).read_text()); print(message.name, message.max_batch_size)\n"
        "    try: parse(Path(path).read_text().replace('max_batch_size', 'max_batch_sise'))\n"
        "    except Exception as error: print('refused', type(error).__name__)\n"
    )
    paths = [str(repository / "net/config.pbtxt"), str(tmp_path / "k/net/config.pbtxt")]
    python = str(environment() / "bin/python")
    variables = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([python, "-c", program, *paths], capture_output=True, text=True, env=variables)
    assert done.stdout.splitlines() == ["net 8", "refused BadInput", "net 0", "refused BadInput"], done.stderr
