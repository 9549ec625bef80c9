"""Engines opened and timed side by side, in this process or in fresh ones.

Where a process happens to put its buffers moves an engine's latency, and the ratio of two engines by up to 1 % either
way, however long that process measures. So what a report quotes comes from several processes, each of which loads the
engine files anew; this module is also what such a process runs (``python -m passdeploy.timing JOB``), and imports
nothing that takes long to load.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from passdeploy.engines._child import answer_job, run_job
from passdeploy.engines._end_to_end import EndToEnd
from passdeploy.engines.base import Engine, Runner, get_backend
from passdeploy.engines.files import load_engine
from passdeploy.latency.measure import Settings, interleave
from passdeploy.latency.measurement import Comparison

if TYPE_CHECKING:
    from passdeploy.targets import Target


def open_runner(engine: Engine, target: Target, images: np.ndarray, scope: str = "engine") -> Runner:
    """A runner that is ready to be timed on `images` (batch, 3, H, W)."""
    inputs = {engine.input_name: np.ascontiguousarray(images, dtype=np.float32)}
    runner = get_backend(engine.backend).runner(engine, target)
    try:
        if scope == "end_to_end":
            return EndToEnd(runner, inputs)
        runner.bind(inputs)
    except BaseException:
        runner.close()
        raise
    return runner


def compare_engines(
    engines: Mapping[str, Engine], target: Target, images: np.ndarray, scope: str, settings: Settings
) -> Comparison:
    """Times engines side by side; the first is the reference."""
    runners: dict[str, Runner] = {}
    try:
        for name, engine in engines.items():
            runners[name] = open_runner(engine, target, images, scope)
        return interleave(runners, settings)
    finally:
        for runner in runners.values():
            runner.close()


def compare_files(
    folders: Mapping[str, Path], target: Target, images: np.ndarray, scope: str, settings: Settings
) -> Comparison:
    """As `compare_engines`, on saved engines, loaded by a fresh process that does nothing else.

    Where the backend lives in this process only, they are timed here.

    Args:
        folders: Of the engines (`load_engine`), by name.
        target: As for `compare_engines`.
        images: Likewise.
        scope: Likewise.
        settings: Likewise.

    Raises:
        BadInput: What the process reports, or that it crashed or took too long.
    """
    backend = get_backend(target.backend)
    module = type(backend).__module__
    if not backend.fresh_processes or module == "__main__":
        engines = {name: load_engine(path) for name, path in folders.items()}
        return compare_engines(engines, target, images, scope, settings)
    job = {
        "backend_module": module,
        "path": sys.path,
        "engines": {name: str(path.resolve()) for name, path in folders.items()},
        "target": asdict(target),
        "scope": scope,
        "settings": asdict(settings),
    }
    with tempfile.NamedTemporaryFile(prefix="passdeploy-images-", suffix=".npy") as file:
        np.save(file, np.ascontiguousarray(images, dtype=np.float32))
        file.flush()
        found = run_job("passdeploy.timing", {**job, "images": file.name}, "timing in a process of its own")
    return Comparison.from_json(found)


def _compare(job: dict[str, Any]) -> dict[str, Any]:
    """What a fresh process does."""
    from passdeploy.targets import Target

    sys.path += [folder for folder in job["path"] if folder not in sys.path]  # a backend may be a user's, found there
    importlib.import_module(job["backend_module"])
    engines = {name: load_engine(Path(path)) for name, path in job["engines"].items()}
    settings = Settings(**{**job["settings"], "percentiles": tuple(job["settings"]["percentiles"])})
    return compare_engines(engines, Target(**job["target"]), np.load(job["images"]), job["scope"], settings).to_json()


if __name__ == "__main__":
    answer_job(_compare)
