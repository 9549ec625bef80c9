"""Engines opened and timed side by side, in this process or in fresh ones.

Where a process happens to put its buffers moves an engine's latency, and the ratio of two engines by up to 1 % either
way, however long that process measures. So what a report quotes comes from several processes, each of which loads the
engine files anew; this module is also what such a process runs (``python -m passdeploy.timing JOB``), and imports
nothing that takes long to load.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from passdeploy.engines._end_to_end import EndToEnd
from passdeploy.engines.base import INPUT, Engine, Runner, get_backend
from passdeploy.engines.files import load_engine
from passdeploy.errors import PassdeployError
from passdeploy.latency.measure import Comparison, Settings, interleave

if TYPE_CHECKING:
    from passdeploy.targets import Target

MOST_S = 1800.0
"""A process that measures for longer than this hangs."""


def open_runner(engine: Engine, target: Target, images: np.ndarray, scope: str = "engine") -> Runner:
    """A runner that is ready to be timed on `images` (batch, 3, H, W)."""
    runner = get_backend(engine.backend).runner(engine, target)
    inputs = {INPUT: np.ascontiguousarray(images, dtype=np.float32)}
    if scope == "end_to_end":
        return EndToEnd(runner, inputs)
    runner.bind(inputs)
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


def compare_in_fresh_process(
    folders: Mapping[str, Path], target: Target, images: np.ndarray, scope: str, settings: Settings
) -> Comparison:
    """As `compare_engines`, on saved engines, each loaded by a process that does nothing else.

    Args:
        folders: Of the engines (`load_engine`), by name.
        target: As for `compare_engines`.
        images: Likewise.
        scope: Likewise.
        settings: Likewise.

    Raises:
        PassdeployError: The process failed; its last line is the message.
    """
    module = type(get_backend(target.backend)).__module__
    with tempfile.TemporaryDirectory(prefix="passdeploy-") as folder:
        job, found = Path(folder) / "job.json", Path(folder) / "comparison.json"
        np.save(Path(folder) / "images.npy", np.ascontiguousarray(images, dtype=np.float32))
        what = {
            "backend_module": module,
            "engines": {name: str(path.resolve()) for name, path in folders.items()},
            "target": asdict(target),
            "scope": scope,
            "settings": asdict(settings),
        }
        job.write_text(json.dumps(what))
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)}
        try:
            ended = subprocess.run(
                [sys.executable, "-m", "passdeploy.timing", str(job)],
                env=environment, capture_output=True, text=True, timeout=MOST_S, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise PassdeployError(f"timing the engines in a process of their own took over {MOST_S:.0f} s") from None
        if ended.returncode != 0 or not found.exists():
            said = (ended.stderr.strip().splitlines() or [f"exit {ended.returncode}"])[-1]
            raise PassdeployError(f"timing the engines in a process of their own failed: {said}")
        return Comparison.from_json(json.loads(found.read_text()))


def _main(job: Path) -> None:
    from passdeploy.targets import Target

    what: dict[str, Any] = json.loads(job.read_text())
    importlib.import_module(what["backend_module"])
    engines = {name: load_engine(Path(path)) for name, path in what["engines"].items()}
    settings = Settings(**{**what["settings"], "percentiles": tuple(what["settings"]["percentiles"])})
    images = np.load(job.with_name("images.npy"))
    compared = compare_engines(engines, Target(**what["target"]), images, what["scope"], settings)
    job.with_name("comparison.json").write_text(json.dumps(compared.to_json()))


if __name__ == "__main__":
    try:
        _main(Path(sys.argv[1]))
    except PassdeployError as error:
        sys.exit(str(error))
