"""Latency models of this machine, kept between runs: per network, target, settings and version of the backend.

What a model predicts depends on what the network executes, not on its weights, so any run of the same architecture on
the same target may use it. It only steers; what ships is decided by the closed loop's own measurements.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from passdeploy.errors import BadInput, NotWritten
from passdeploy.groups import Operator
from passdeploy.latency.features import Features
from passdeploy.latency.model import LatencyModel, operators_digest
from passdeploy.user_cache import user_cache
from passdeploy.workspace import json_digest


def cache_dir() -> Path:
    """The user's cache folder for latency profiles (not created)."""
    return user_cache() / "profiles"


class ProfileCache:
    """The place of one latency model in the cache.

    Args:
        operators: What the network executes.
        units: Units of each group.
        settings: All else that latency depends on, and how it is measured; JSON-able.
    """

    def __init__(self, operators: Sequence[Operator], units: Sequence[int], settings: dict[str, Any]) -> None:
        self._operators, self._units = operators, units
        shapes = operators_digest(Features(operators, units, 1, 4))
        self.path = cache_dir() / f"{json_digest({'operators': shapes, **settings})}.json"

    def load(self) -> LatencyModel | None:
        """The model, or None: there is none, or what is there can't be read (by this version)."""
        try:
            return LatencyModel.load(self.path, self._operators, self._units)
        except BadInput:
            return None

    def store(self, model: LatencyModel) -> bool:
        """Keeps a model for later runs; False where nothing can be written, which is no reason to fail."""
        try:
            model.save(self.path)
        except NotWritten:
            return False
        return True
