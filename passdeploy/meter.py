"""Measures structures on the target: cut from the dense ONNX file, compiled, and timed against the dense engine.

Which structures are measured and why is up to the profile and the closed loop; here lies how. Latency does not depend
on the values of the weights, so the thin graphs are cut from the dense one and nothing is trained.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from passdeploy.engines._common import told
from passdeploy.engines.base import CompileInput, Engine, Runner, get_backend
from passdeploy.errors import BadInput, DenseFailed, NotWritten, PassdeployError
from passdeploy.export import OnnxSlicer, export_program
from passdeploy.groups import Groups
from passdeploy.latency.measure import QUICK, Settings
from passdeploy.latency.measurement import Comparison
from passdeploy.latency.sampler import Sampler
from passdeploy.structure import Structure
from passdeploy.targets import Target
from passdeploy.timing import compare_files, open_runner

SLOW_S = 2.0
"""Builds that take longer are kept, in case the same structure is measured again."""
KEPT_BYTES = 256 * 2**20


@contextlib.contextmanager
def _dense_engine() -> Iterator[None]:
    """What goes wrong inside is the dense engine's."""
    try:
        yield
    except NotWritten:
        raise
    except BadInput as error:
        raise DenseFailed(f"dense engine: {error}") from error


class Meter:
    """Times structures against the dense engine: loaded once for `sample`, by every process of `compare`.

    Args:
        slicer: Of the dense model.
        thin_slicer: Of the model that other structures are cut from, where that is another: behind a prompt which
            costs time.
        groups: Of the network.
        target: Where it is measured.
        images: (n, 3, H, W), real ones: compiled with, and the first batch is what is timed.
        scope: ``engine`` or ``end_to_end``.
    """

    def __init__(
        self,
        slicer: OnnxSlicer,
        groups: Groups,
        target: Target,
        images: np.ndarray,
        scope: str = "engine",
        *,
        thin_slicer: OnnxSlicer | None = None,
    ) -> None:
        self.slicer, self.groups, self.target, self.images, self.scope = slicer, groups, target, images, scope
        self._thin_slicer, self._whole = thin_slicer or slicer, groups.dense().digest()
        self._backend = get_backend(target.backend)
        self._dense: Runner | None = None
        self._dense_file: tempfile.TemporaryDirectory[str] | None = None
        self._dense_ran = False  # in a process of its own
        self._sampler: Sampler | None = None
        self._kept: dict[str, Engine] = {}

    def engine(self, structure: Structure) -> Engine:
        """Compiles the thin graph of a structure, unless that took long before: then the engine was kept."""
        key = structure.digest()
        if key in self._kept:
            return self._kept[key]
        begun = time.perf_counter()
        engine = self._compiled(structure)
        kept = sum(len(each.data) for each in self._kept.values())
        if time.perf_counter() - begun > SLOW_S and kept + len(engine.data) <= KEPT_BYTES:
            self._kept[key] = engine
        return engine

    def _compiled(self, structure: Structure) -> Engine:
        slicer = self.slicer if structure.digest() == self._whole else self._thin_slicer
        with tempfile.TemporaryDirectory(prefix="passdeploy-") as folder:
            path = Path(folder) / "model.onnx"
            path.write_bytes(slicer.slice(structure))
            program = None
            if self._backend.wants_program:
                program = export_program(slicer.thin(structure), self.images[: self.target.batch])
            return self._backend.compile(CompileInput(path, program, self.images), self.target)

    def _timed(self, structure: Structure) -> Runner:
        return open_runner(self.engine(structure), self.target, self.images[: self.target.batch], self.scope)

    def compare(self, structure: Structure, settings: Settings) -> Comparison:
        """Times a structure (``thin``) against the dense engine (``dense``), interleaved, in a process of its own.

        As the engine that ships will be: in a process that has trained and searched, ratios are other by some percent.
        """
        if self._dense_file is None:
            with _dense_engine():
                engine = self.engine(self.groups.dense())
            self._dense_file = tempfile.TemporaryDirectory(prefix="passdeploy-dense-")
            self._backend.save(engine, Path(self._dense_file.name))
        with tempfile.TemporaryDirectory(prefix="passdeploy-thin-") as folder:
            self._backend.save(self.engine(structure), Path(folder))
            folders = {"dense": Path(self._dense_file.name), "thin": Path(folder)}
            try:
                found = self._compare_files(folders, settings)
            except NotWritten:
                raise
            except BadInput:
                if not self._dense_ran:  # is it the structure's fault?
                    with _dense_engine():
                        self._compare_files({"dense": folders["dense"], "thin": folders["dense"]}, QUICK)
                    self._dense_ran = True
                raise
        self._dense_ran = True
        return found

    def _compare_files(self, folders: dict[str, Path], settings: Settings) -> Comparison:
        return compare_files(folders, self.target, self.images[: self.target.batch], self.scope, settings)

    def sample(self, structure: Structure) -> dict[str, float]:
        """A short comparison, for fitting the latency model."""
        try:
            if self._sampler is None:
                one_thread = self.target.compute_capability is None and self.target.threads == 1
                with _dense_engine(), told("the engine"):  # its warm-up, too
                    self._dense = self._timed(self.groups.dense())
                    self._sampler = Sampler(self._dense, one_thread=one_thread)
            with told("the engine"), self._timed(structure) as thin:
                return self._sampler(thin)
        except PassdeployError:
            # Perhaps a child process died in which the dense engine was loaded, too: the next one gets a new one.
            self._unload()
            raise

    def _unload(self) -> None:
        if self._dense is not None:
            self._dense.close()
            self._dense = self._sampler = None

    def close(self) -> None:
        """Unloads the dense engine."""
        self._unload()
        if self._dense_file is not None:
            self._dense_file.cleanup()
            self._dense_file = None

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
