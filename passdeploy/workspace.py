"""The run directory: stages that are functions of recorded inputs, written atomically, skipped when nothing changed.

A stage writes into ``.partial/<stage>`` and is moved to ``<stage>`` when it is complete; ``stage.json`` in it records
the inputs it was computed from and the digest of each file. That record is all there is to resuming: a stage whose
inputs and files are as recorded is not run again, and a partial folder with the same inputs is continued. What was
left of other inputs, finished or not, is kept once as ``.partial/<stage>.before``: who undoes the change has it back.
Of two such the one that took longer is kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from passdeploy.errors import BadInput, NotWritten
from passdeploy.locking import LOCK

RECORD = "stage.json"
INPUTS = ".inputs.json"
CLOCK = ".seconds"
MANIFEST = "manifest.json"
MANIFEST_SCHEMA = "passdeploy.manifest/1"
CONFIG = "config.yaml"
SCRATCH_SUFFIXES = (".ckpt", ".tmp")

_SETTLED_NS = 2_000_000_000
"""Clocks of file systems are coarse: a file changed less than this ago could be changed again without a new time."""
_digests: dict[Path, tuple[tuple[int, ...], str]] = {}
"""What this process has hashed, by path: the file's size, times and inode, and its digest."""


def sha256(path: Path) -> str:
    """Hex digest of a file; one that nobody has touched since is not read again."""
    path = path.absolute()
    facts = path.stat()
    state = (facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino, facts.st_dev)
    known = _digests.get(path)
    if known is not None and known[0] == state:
        return known[1]
    now = time.time_ns()
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if now - max(facts.st_mtime_ns, facts.st_ctime_ns) > _SETTLED_NS:
        _digests[path] = state, digest
    return digest


def json_digest(value: object) -> str:
    """Hex SHA-256 of a JSON-able value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_atomic(path: Path, content: str | bytes | memoryview) -> None:
    """Replaces a file by new content: afterwards it holds all of it or is as it was."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    data = content.encode() if isinstance(content, str) else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise NotWritten(
            f"{path}: cannot be written ({error.strerror}); free some space or choose another --out, then run again: "
            "what was finished is kept"
        ) from None


def write_json(path: Path, value: object) -> None:
    """Writes JSON atomically; NaN is refused."""
    write_atomic(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Reads JSON. Raises `BadInput` when it is missing or malformed."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: cannot be read ({error})") from None


def copy_file(source: Path, target: Path) -> None:
    """Copies a file atomically."""
    write_atomic(target, source.read_bytes())


def link_file(source: Path, target: Path) -> None:
    """The same file under another name: linked where the file system can, else copied. Finished files never change."""
    target.unlink(missing_ok=True)  # of a call that was killed: perhaps the source itself, never to be written through
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def link_folder(source: Path, target: Path) -> None:
    """The same files in another folder, which is replaced."""
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary, copy_function=lambda a, b: link_file(Path(a), Path(b)))
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)


def _is_scratch(path: Path, root: Path) -> bool:
    """Whether a file of a stage's folder is none of its outputs: also what a writer that was killed left behind."""
    inside = path.relative_to(root).parts
    return any(part.startswith(".") for part in inside) or path.suffix in SCRATCH_SUFFIXES


def _recorded(folder: Path) -> dict[str, Any] | None:
    """The record of a stage's folder, whatever its files are like; None when there is none."""
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return record if isinstance(record["outputs"], dict) and {"inputs", "seconds"} <= record.keys() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _finished(folder: Path) -> dict[str, Any] | None:
    """The record of a stage's folder; None when there is none or the files are not as recorded."""
    record = _recorded(folder)
    if record is None:
        return None
    outputs: Mapping[str, str] = record["outputs"]
    intact = all((folder / name).is_file() and sha256(folder / name) == digest for name, digest in outputs.items())
    return record if intact else None


def _begun(folder: Path) -> Any:
    """The inputs of a stage's folder, whole or partial; None of one that can't be gone on from."""
    if (record := _finished(folder)) is not None:
        return record["inputs"]
    with contextlib.suppress(OSError, ValueError):
        return json.loads((folder / INPUTS).read_text(encoding="utf-8"))
    return None


def _spent(folder: Path) -> float:
    """Seconds spent on a stage's folder, finished or not; of an attempt that was killed, until it last wrote a file."""
    if (record := _recorded(folder)) is not None:
        return float(record["seconds"])
    with contextlib.suppress(OSError, ValueError):
        clock, written = folder / CLOCK, max(path.lstat().st_mtime for path in folder.rglob("*"))
        return float(clock.read_text(encoding="utf-8")) + max(min(written, time.time()) - clock.stat().st_mtime, 0.0)
    return 0.0


def _outlasted(folder: Path, aside: Path) -> bool:
    """Whether what was set aside before took longer than a stage's folder, and stays instead."""
    # Of two that took about as long, the newer one is the likelier to be asked for again.
    return _begun(aside) is not None and _spent(folder) + 1 < _spent(aside)


def _set_aside(folder: Path, aside: Path) -> None:
    """Keeps a stage's folder under another name; removed is what is of no use, or took less time than what is there."""
    if _begun(folder) is None or _outlasted(folder, aside):
        shutil.rmtree(folder, ignore_errors=True)
    else:
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)


def is_run_directory(root: Path) -> bool:
    """Whether a folder is a run's: other programs, too, call their files ``config.yaml`` and ``manifest.json``."""
    from passdeploy.config import RunConfig

    with contextlib.suppress(OSError, ValueError):
        manifest = json.loads((root / MANIFEST).read_text(encoding="utf-8"))
        if isinstance(manifest, dict) and manifest.get("schema") == MANIFEST_SCHEMA:
            return True
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError):
        config = yaml.safe_load((root / CONFIG).read_text(encoding="utf-8"))
        # A run records every key; a configuration that somebody wrote beside their own files names some.
        return isinstance(config, dict) and set(config) == set(RunConfig.model_fields)
    return False


class Workspace:
    """A run directory, or the folder of one budget in it.

    Args:
        root: Created when it does not exist.

    Raises:
        BadInput: It can't be created or written.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            root.mkdir(parents=True, exist_ok=True)
            probe = root / f".probe.{os.getpid()}"
            probe.write_text("")
            probe.unlink()
        except OSError as error:
            raise BadInput(f"--out {root}: cannot be written ({error.strerror}); choose another folder") from None

    def clear(self) -> None:
        """Removes all that runs wrote here; refuses a folder that is not a run directory."""
        children = [child for child in self.root.iterdir() if child.name != LOCK]
        if children and not is_run_directory(self.root):
            raise BadInput(
                f"--out {self.root}: is not a run directory and not empty; --fresh would delete what is in it"
            )
        # Last what says whose folder it is: a kill on the way leaves one that the same command clears.
        for child in sorted(children, key=lambda child: (child.name == MANIFEST, child.name == CONFIG)):
            if child.is_dir() and not child.is_symlink():
                shutil.rmtree(child)
            else:
                child.unlink()

    def folder(self, stage: str) -> Path:
        """Where a finished stage lies."""
        return self.root / stage

    def record(self, stage: str) -> dict[str, Any] | None:
        """What a finished stage recorded; None when it is not there or its files are not as recorded."""
        return _finished(self.folder(stage))

    def current(self, stage: str, inputs: Mapping[str, Any]) -> bool:
        """Whether the stage is finished with these inputs (JSON-able)."""
        record = self.record(stage)
        return record is not None and record["inputs"] == json.loads(json.dumps(inputs))

    def digest(self, stage: str) -> str:
        """Digest over a finished stage's files: what later stages record as their input."""
        record = self.record(stage)
        if record is None:
            raise BadInput(f"{self.folder(stage)}: stage {stage!r} has not run here; run it first")
        return json_digest(record["outputs"])

    def seconds(self, stage: str) -> float:
        """How long the stage took, all its attempts together."""
        record = _recorded(self.folder(stage))
        return float(record["seconds"]) if record else 0.0

    def run(self, stage: str, inputs: Mapping[str, Any], body: Callable[[Path], None]) -> bool:
        """Runs a stage unless it is finished with the same inputs.

        Args:
            stage: Its name, which is its folder's.
            inputs: JSON-able; all that its result depends on.
            body: Called with the folder to write into; what an interrupted call left there is still in it.

        Returns:
            Whether it ran.
        """
        inputs = json.loads(json.dumps(inputs))
        if self.current(stage, inputs):
            return False
        partial = self._partial(stage)
        self._take_up(stage, inputs)
        if (done := _finished(partial)) is not None and done["inputs"] == inputs:
            self._adopt(stage, partial)  # killed while it was moved into place
            return False
        if not partial.exists():
            write_json(partial / INPUTS, inputs)
        before = _spent(partial)
        write_atomic(partial / CLOCK, str(before))  # its time says when this attempt began
        start = time.monotonic()
        try:
            body(partial)
        except (OSError, SafetensorError) as error:
            if isinstance(error, OSError) and error.errno not in NotWritten.ERRNOS:
                raise BadInput(f"{stage}: {error}") from error  # an image that is gone, a socket, a child process
            raise NotWritten(
                f"{partial}: writing failed ({getattr(error, 'strerror', None) or error}); free some space, then run "
                "again: what was finished is kept"
            ) from error
        finally:
            seconds = before + time.monotonic() - start
            if partial.exists():
                with contextlib.suppress(BadInput):  # a full disk has been reported already
                    write_atomic(partial / CLOCK, str(seconds))
        files = [path for path in sorted(partial.rglob("*")) if path.is_file()]
        kept = [path for path in files if not _is_scratch(path, partial)]
        outputs = {path.relative_to(partial).as_posix(): sha256(path) for path in kept}
        # First the record, then the cleaning up: whoever is killed in between is finished, not at the beginning.
        write_json(partial / RECORD, {"inputs": inputs, "outputs": outputs, "seconds": round(seconds, 3)})
        self._adopt(stage, partial)
        return True

    def changed(self, stage: str, inputs: Mapping[str, Any]) -> list[str]:
        """Keys of the inputs for which a stage that was begun has to start over."""
        from passdeploy.config import differing_keys

        now = json.loads(json.dumps(inputs))
        folders = (self._partial(stage), self.folder(stage), self._partial(f"{stage}.before"))
        partial, finished, before = map(_begun, folders)
        last = finished if partial is None else partial
        return [] if last is None or now in (partial, before) else differing_keys(last, now)

    def keeps(self, stage: str) -> bool:
        """Whether what a stage has of other inputs outlives its starting over."""
        partial, aside = self._partial(stage), self._partial(f"{stage}.before")
        return not _outlasted(self.folder(stage) if _begun(partial) is None else partial, aside)

    def _partial(self, stage: str) -> Path:
        return self.root / ".partial" / stage

    def _take_up(self, stage: str, inputs: Any) -> None:
        """Leaves a partial folder of these inputs, perhaps the one that was set aside, or none."""
        partial, aside, back = (self._partial(name) for name in (stage, f"{stage}.before", f".{stage}.tmp"))
        if _begun(partial) == inputs:
            return
        if _begun(aside) == inputs:
            shutil.rmtree(back, ignore_errors=True)
            aside.rename(back)
        _set_aside(partial, aside)
        if _begun(back) == inputs:
            back.rename(partial)

    def _adopt(self, stage: str, partial: Path) -> None:
        """Cleans a complete stage and moves it into place."""
        for path in sorted(partial.rglob("*"), reverse=True):  # what is in a folder comes before the folder
            if _is_scratch(path, partial):
                path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        folder = self.folder(stage)
        if folder.exists():
            _set_aside(folder, self._partial(f"{stage}.before"))
        partial.replace(folder)
        self.update_manifest()

    def update_manifest(self) -> None:
        """Lists the finished stages; a run that was killed just before this has an old list."""
        stages = {}
        for path in sorted(self.root.glob(f"*/{RECORD}")):
            if (record := _recorded(path.parent)) is not None:  # a spoilt one is made again when its turn comes
                stages[path.parent.name] = {key: record[key] for key in ("inputs", "outputs", "seconds")}
        manifest = {"schema": MANIFEST_SCHEMA, "stages": stages}
        with contextlib.suppress(BadInput):  # one that can't be read is written anew
            if read_json(self.root / MANIFEST) == manifest:
                return
        write_json(self.root / MANIFEST, manifest)
