"""A latency model is found again by the same network on the same target, and by no other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from passdeploy.groups import find_groups, operators
from passdeploy.latency.cache import ProfileCache, cache_dir
from passdeploy.latency.model import LatencyModel
from passdeploy.models import build
from passdeploy.user_cache import user_cache
from tests import scripted


def network(size: int) -> tuple[tuple, list[int]]:  # type: ignore[type-arg]
    model, example = build("tiny-resnet", 3).eval(), torch.zeros(1, 3, size, size)
    groups = find_groups(model, example)
    return operators(model, example, groups), list(groups.units.values())


def fitted(ops: tuple, units: list[int]) -> LatencyModel:  # type: ignore[type-arg]
    rng = np.random.default_rng(0)
    widths = np.stack([[rng.integers(1, u + 1) for u in units] for _ in range(30)]).astype(float)
    ratios = 0.2 + 0.8 * (widths / np.array(units)).mean(1)
    return LatencyModel.fit(ops, units, widths, ratios, 2.0)


def test_found_again_and_only_for_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ops, units = network(16)
    cache = ProfileCache(ops, units, {"backend": "a", "version": "1"})
    assert cache.load() is None
    model = fitted(ops, units)
    assert cache.store(model)
    found = ProfileCache(ops, units, {"backend": "a", "version": "1"}).load()
    assert found is not None and cache.path.parent == cache_dir()
    dense = np.array([units], dtype=float)
    assert np.allclose(found.predict_many(dense), model.predict_many(dense))
    assert ProfileCache(ops, units, {"backend": "a", "version": "2"}).load() is None
    assert ProfileCache(*network(24), {"backend": "a", "version": "1"}).load() is None


def test_a_broken_or_unwritable_cache_is_no_reason_to_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ops, units = network(16)
    cache = ProfileCache(ops, units, {})
    cache.store(fitted(ops, units))
    cache.path.write_text(cache.path.read_text()[:100])
    assert cache.load() is None
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert not ProfileCache(ops, units, {}).store(fitted(ops, units))


def test_a_cache_that_may_not_be_looked_into_is_no_reason_to_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container whose user is another than the one that the home belongs to."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ops, units = network(16)

    def forbidden(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    for how in ("stat", "open", "is_file", "read_text"):
        monkeypatch.setattr(Path, how, forbidden)
    assert ProfileCache(ops, units, {}).load() is None


def test_a_user_without_a_home_has_nothing_kept_and_that_is_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", nobody)
    assert user_cache() == Path("/.cache/passdeploy")
    monkeypatch.setattr(Path, "home", lambda: Path("/home/someone"))
    assert user_cache() == Path("/home/someone/.cache/passdeploy")


def test_a_second_run_measures_nothing_for_its_profile(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    weights = str(finished / "dense" / "dense.safetensors")
    for name, how in (("first", "use"), ("second", "use"), ("third", "refresh"), ("fourth", "off")):
        running = scripted.start(tmp_path / name, weights=weights, profile={"cache": how})
        running.slicer = scripted.slicer(running)  # type: ignore[misc]
        running.shared("profile")
    logs = {p.parent.parent.name for p in tmp_path.glob("*/profile/measurements.jsonl")}
    assert logs == {"first", "third", "fourth"}
    first, second = ((tmp_path / n / "profile" / "profile.json").read_text() for n in ("first", "second"))
    assert first == second
