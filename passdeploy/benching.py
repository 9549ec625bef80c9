"""`passdeploy bench`: engines, ONNX files, run directories and bundles, timed side by side."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from passdeploy.bench_outcome import stored_report
from passdeploy.console import Ui
from passdeploy.engines._common import one_line, told
from passdeploy.engines.base import CompileInput, Engine, Runner, get_backend
from passdeploy.engines.files import load_engine
from passdeploy.errors import BadInput, PassdeployError, Unavailable
from passdeploy.latency.measure import BENCH, LEAST, Clock
from passdeploy.latency.measurement import Comparison
from passdeploy.layers import LayerTimes, by_block
from passdeploy.targets import Target, resolve
from passdeploy.timing import open_runner
from passdeploy.workspace import RECORD, read_json

LONG_S = 10.0
"""Whoever waits longer than this is told."""


@dataclass(frozen=True)
class Made:
    """What an engine was compiled for."""

    backend: str
    precision: str
    batch: int
    threads: int

    def __str__(self) -> str:
        return f"{self.backend} {self.precision}, batch {self.batch}, threads {self.threads}"


class Opened(dict[str, Runner]):
    """Engines that are ready to be timed, by label.

    Attributes:
        made: What each was compiled for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[str, Made] = {}


@dataclass(frozen=True)
class Source:
    """Something that can be timed.

    Attributes:
        label: As given.
        engine: Compiled; None for a bundle, which is checked before its engine is loaded.
        bundle: Folder of the bundle.
    """

    label: str
    engine: Engine | None = None
    bundle: Path | None = None


def _batch(path: Path) -> int:
    """Images that an ONNX file takes at once; 1 where it takes any number."""
    import onnx

    try:
        graph = onnx.load(str(path), load_external_data=False).graph
        weights = {tensor.name for tensor in graph.initializer}
        (images,) = (value for value in graph.input if value.name not in weights)
        return next((d.dim_value or 1 for d in images.type.tensor_type.shape.dim), 1)
    except Exception as error:
        raise BadInput(f"{path}: cannot be read as an ONNX network of one input ({one_line(error)})") from None


def _images(label: str, engine: Engine, rng: np.random.Generator) -> np.ndarray:
    """Random images of the engine's shape."""
    shape = engine.meta["inputs"][engine.input_name]
    if len(shape) != 4 or min(shape[1:]) < 1:
        sizes = ", ".join("any" if size < 1 else str(size) for size in shape)
        raise BadInput(f"bench {label}: takes ({sizes}), not images of one size (N, C, H, W); export it for one")
    return rng.random([max(1, size) for size in shape], dtype=np.float32)


def _target(name: str, backend: str | None, precision: str | None, batch: int, threads: int) -> Target:
    target = resolve(name, backend=backend, precision=precision, batch=batch, threads=threads)
    reason = get_backend(target.backend).runnable(target)
    if reason is not None or not target.attached:
        raise BadInput(f"--target {name}: nothing can be timed here ({reason or 'it is not attached'})")
    return target


def _fitting(name: str, engine: Engine, batch: int, threads: int) -> Target:
    """The target as an engine was compiled for it."""
    precision = str(engine.meta["precision"])
    try:
        return _target(name, engine.backend, precision, batch, threads)
    except (BadInput, Unavailable) as error:
        made = Made(engine.backend, precision, batch, threads)
        raise BadInput(f"{error}; the engine was compiled for {made}: give the --target that it is for") from None


def _folders(path: Path) -> list[Path]:
    """Where the engine of `path` may lie; of a run that is not finished in its stage's folder, if it was proven."""
    try:
        proven = bool(read_json(path / "compile" / "proof.json")["ok"])
    except (OSError, PassdeployError, KeyError, TypeError):
        proven = False
    return [path, path / "engine", *([path / "compile" / "engine"] if proven else [])]


def open_source(given: str, target: str, backend: str | None, threads: int) -> Source:
    """Finds out what `given` is; raises `BadInput` when it is nothing that can be timed."""
    path = Path(given)
    if (path / "SHA256SUMS").is_file():
        return Source(given, bundle=path)
    for engine in _folders(path):
        if (engine / "engine.json").is_file():
            return Source(given, load_engine(engine))
    if path.is_file() and path.suffix == ".onnx" and not (path.parent / "engine.json").is_file():
        made = _target(target, backend, None, _batch(path), threads)
        return Source(given, get_backend(made.backend).compile(CompileInput(onnx=path), made))
    if path.is_file():
        return Source(given, load_engine(path))
    several = [
        str(each.parent)
        for each in sorted(path.glob("*/engine"))
        if (each / "engine.json").is_file() and not (each.parent / RECORD).is_file()  # a stage's
    ]
    if several:
        raise BadInput(f"bench {given}: has several budgets; give one of them: {', '.join(several)}")
    raise BadInput(f"bench {given}: is no engine, ONNX file, run directory or bundle; check the path")


def _compiled_as(given: list[str]) -> tuple[str | None, int]:
    """Backend and threads of the first engine: what ONNX files beside it are compiled for, if nothing else is asked."""
    for path in map(Path, given):
        if (path / "SHA256SUMS").is_file():
            from passdeploy.shipping.contents import open_bundle

            with suppress(PassdeployError):  # what is wrong with it is said when it is opened
                chosen = open_bundle(path, check_content=False).choose()
                return chosen.backend, chosen.threads
        for folder in (*_folders(path), *([path.parent] if path.is_file() else [])):
            if (folder / "engine.json").is_file():
                engine = load_engine(folder)
                return engine.backend, int(engine.meta.get("threads", 1))
    return None, 1


@contextmanager
def opened(
    given: list[str],
    target: str = "cpu",
    backend: str | None = None,
    threads: int | None = None,
    against: Path | None = None,
) -> Iterator[Opened]:
    """Everything given, loaded and ready to be timed on random images, by label; closed on exit.

    Raises:
        BadInput: Something can't be timed here, takes another number of images at a time than the rest, or was compiled
            for something else than the engines of the report `against`.
    """
    labels = [label if given.count(label) == 1 else f"{label} #{i + 1}" for i, label in enumerate(given)]
    found = _compiled_as(given)
    backend, threads = backend or found[0], threads or found[1]
    runners = Opened()
    rng = np.random.default_rng(0)
    with ExitStack() as stack, told("bench: one of the engines"):  # while they are timed, too
        for label, name in zip(labels, given, strict=True):
            try:
                source = open_source(name, target, backend, threads)
                if source.engine is None:
                    assert source.bundle is not None
                    runners[label], runners.made[label] = _open_bundle(source.bundle, stack, rng)
                    continue
                meta, images = source.engine.meta, _images(label, source.engine, rng)
                kept = int(meta.get("threads", threads))
                fitting = _fitting(target, source.engine, len(images), kept)
                runners[label] = stack.enter_context(open_runner(source.engine, fitting, images))
                runners.made[label] = Made(fitting.backend, fitting.precision, fitting.batch, fitting.threads)
            except (BadInput, Unavailable):
                raise
            except Exception as error:  # whatever a runtime raises for a network that it can't run
                raise BadInput(f"bench {label}: cannot be timed: {one_line(error)}") from error
        if len({made.batch for made in runners.made.values()}) > 1:  # what is compared is the time of a call
            sizes = ", ".join(f"{label}: {made.batch}" for label, made in runners.made.items())
            raise BadInput(f"bench: takes engines of one batch size ({sizes}); compile them for the same --batch")
        if against is not None:
            _check_alike(runners.made, against)
        yield runners


def _open_bundle(folder: Path, stack: ExitStack, rng: np.random.Generator) -> tuple[Runner, Made]:
    """Timed as the engine folders beside it are: what a bundle's own runner adds is not the engine's."""
    from passdeploy.shipping import manifest
    from passdeploy.shipping.contents import MANIFEST
    from passdeploy.shipping.measuring import sealed_engine, target_of
    from passdeploy.shipping.runner import load

    with load(folder) as model:  # digests, hardware, sample outputs
        contents, info = model.contents, model.engine
    target = target_of(info, manifest.read(contents.sealed.read(MANIFEST)))
    images = rng.random((info.batch, *contents.input_shape), dtype=np.float32)
    runner = stack.enter_context(open_runner(sealed_engine(contents, info), target, images))
    return runner, Made(info.backend, info.precision, info.batch, info.threads)


def layers(runners: Opened) -> list[LayerTimes]:
    """What each part of the networks costs in each of the engines, in their order.

    Raises:
        BadInput: A runtime does not tell.
    """
    times = []
    for label, runner in runners.items():
        taken = runner.layer_times()
        if taken is None:
            raise BadInput(f"bench {label}: its runtime does not tell what its layers take; leave out --layers")
        times.append(taken)
    return by_block(times)


def _check_alike(made: Mapping[str, Made], path: Path) -> None:
    """Refuses what was compiled for something else than a report's engines: its ratio would be another one."""
    target = stored_report(path).target
    then = Made(target.backend, target.precision, target.batch, target.threads)
    for label, now in made.items():
        # On a GPU the CPU's threads do not count.
        if now != (then if target.compute_capability is None else replace(then, threads=now.threads)):
            raise BadInput(
                f"--against {path}: its engines are {then}, and {label} is {now}; give the engines of such a run, "
                "compile/dense-engine and engine in its folder"
            )


def announced(ui: Ui, rounds: int, clock: Clock = time.perf_counter) -> Callable[[int], None]:
    """Says after two rounds (the first follows the warm-up) how long the others take, when that is long.

    Nothing is drawn while engines are timed: a progress bar's thread would be timed with them.

    Args:
        ui: Where it is said.
        rounds: How many there are, unless some have to be repeated.
        clock: Seconds, for tests.
    """
    last = clock()

    def progress(done: int) -> None:
        nonlocal last
        now = clock()
        each = now - last
        left = min((rounds - done) * each, max(BENCH.max_s, (LEAST - done) * each))
        if done == 2 and left > LONG_S:
            ui.say(f"Timing for about {left:.0f} s: up to {rounds} rounds, of which disturbed ones are repeated.")
        last = now

    return progress


def to_json(comparison: Comparison, made: Mapping[str, Made]) -> dict[str, Any]:
    """Measurements, what was measured, and ratios to the first."""
    rows = {}
    for name, measurement in comparison.measurements.items():
        rows[name] = measurement.to_json() | {
            **vars(made[name]),
            "times_as_fast": None if name == comparison.reference else comparison.ratio(name).to_json(),
            "verdict": None if name == comparison.reference else comparison.verdict(name),
        }
    return json.loads(json.dumps({"reference": comparison.reference, "engines": rows}))  # type: ignore[no-any-return]
