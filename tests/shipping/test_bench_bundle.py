"""`passdeploy bench` of a bundle: what is timed is its engine, as an engine in a folder is."""

from __future__ import annotations

from pathlib import Path

from passdeploy import benching
from passdeploy.engines.base import Runner
from passdeploy.shipping.bundle import BundleSource


def test_a_bundle_is_timed_as_its_engine_is(sealed_bundle: Path, source: BundleSource) -> None:
    engine = str(source.engines[0].folder)
    with benching.opened([engine, str(sealed_bundle)]) as runners:
        first, second = runners.values()
        assert type(first) is type(second) and isinstance(second, Runner)
        assert len(set(runners.made.values())) == 1
        second.call()
        assert [part.name for part in benching.layers(runners)]
