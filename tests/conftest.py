"""Runs of the whole pipeline that several test files look at; each is made once, when it is first asked for."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """A cache folder of the session's own, so that neither finds what the other measured; data stay where they are."""
    _read_operators_once()
    if "PYTEST_XDIST_WORKER" in os.environ:  # it has the controller's
        return
    from passdeploy.data import cache_dir

    given = os.environ.get("PASSDEPLOY_DATA")
    os.environ["PASSDEPLOY_DATA"] = os.pathsep.join([*([given] if given else []), str(cache_dir())])
    os.environ["XDG_CACHE_HOME"] = folder = tempfile.mkdtemp(prefix="passdeploy-tests-cache-")
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


def _read_operators_once() -> None:
    """PyTorch reads the sources of all its ONNX operators anew at each export: a quarter of what exporting takes."""
    with contextlib.suppress(Exception):  # no part of its interface
        from torch.onnx._internal.exporter._registration import onnxscript_apis

        module = importlib.import_module(getattr(onnxscript_apis, "_name", onnxscript_apis.__name__))
        module.get_torchlib_ops = functools.cache(module.get_torchlib_ops)


@pytest.fixture(autouse=True)
def modules_of_users() -> Iterator[None]:
    """What a test imported as a user's own module is forgotten: the next one may mean another of the same name."""
    yield
    for name in ("nets", "mydata"):
        sys.modules.pop(name, None)


@pytest.fixture(autouse=True)
def no_step_summary(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a command under test says stays out of the summary of the CI job that runs the tests."""
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)


@pytest.fixture(scope="session")
def one_thread() -> Iterator[None]:
    """Tiny networks on a busy machine are trained fastest by one thread."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def finished(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory: three budgets, of which one is met, one is out of reach and one is met by the dense engine."""
    from tests import scripted

    out = tmp_path_factory.mktemp("runs") / "several"
    scripted.run(out, latency="2x,50x,5s")
    return out


@pytest.fixture(scope="session")
def single(one_thread: None, finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with the one budget 2x, on the weights that `finished` trained."""
    from tests import scripted

    out = tmp_path_factory.mktemp("runs") / "single"
    scripted.run(out, weights=str(finished / "dense" / "dense.safetensors"))
    return out


@pytest.fixture(scope="module")
def exported_once() -> Iterator[None]:
    """Equal networks of a file's runs are exported once."""
    from tests import scripted

    with scripted.exported_once():
        yield


@pytest.fixture
def copied(single: Path, tmp_path: Path) -> Callable[[], Path]:
    """Makes copies of the run directory with the one budget, to be spoilt."""

    def copy() -> Path:
        return Path(shutil.copytree(single, tmp_path / "copied"))

    return copy
