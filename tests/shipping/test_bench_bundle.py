"""`passdeploy bench` of a bundle: what is timed is its engine, as an engine in a folder is."""

from __future__ import annotations

from pathlib import Path

from passdeploy import benching
from passdeploy.engines.base import CompileInput, Runner, get_backend
from passdeploy.shipping.bundle import BundleSource, EngineSource, write_bundle
from passdeploy.targets import resolve
from tests.shipping.conftest import make_source


def test_a_bundle_is_timed_as_its_engine_is(sealed_bundle: Path, source: BundleSource) -> None:
    engine = str(source.engines[0].folder)
    with benching.opened([engine, str(sealed_bundle)]) as runners:
        first, second = runners.values()
        assert type(first) is type(second) and isinstance(second, Runner)
        assert len(set(runners.made.values())) == 1
        second.call()
        assert [part.name for part in benching.layers(runners)]


def test_an_onnx_file_is_compiled_as_the_bundle_beside_it(tmp_path: Path) -> None:
    graph = make_source(tmp_path / "run").onnx
    backend, target = get_backend("openvino"), resolve("cpu", backend="openvino", threads=2)
    backend.save(backend.compile(CompileInput(graph), target), tmp_path / "openvino")
    source = make_source(tmp_path / "again", engines=(EngineSource(tmp_path / "openvino", target),))
    bundle = write_bundle(tmp_path / "bundle", source)
    with benching.opened([str(graph), str(bundle)]) as runners:
        assert [(made.backend, made.threads) for made in runners.made.values()] == [("openvino", 2)] * 2
