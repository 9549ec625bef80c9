"""SHA256SUMS: the root of a bundle. Strictly written, strictly read, and read before anything else is parsed.

Standard library only: the runner depends on it.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from passdeploy.errors import BadInput, PassdeployError

SUMS = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64})  ([^\x00-\x1f\x7f\\]+)")
_MAX_SUMS = 4 << 20
"""Bytes; a SHA256SUMS above this is not ours."""
_WORTH_THREADS = 16 << 20
"""Bytes in all from which starting threads costs less than it saves."""


class Refused(PassdeployError):
    """A bundle that is not what was sealed, or that does not belong on this machine (exit 1)."""


def digest_bytes(data: bytes) -> str:
    """SHA-256, hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def digest_file(path: Path) -> str:
    """SHA-256 of a file's content, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digests(paths: list[Path]) -> Iterable[str]:
    """Digests of files, in order; large ones several at a time, since hashing needs no lock of Python's."""
    if sum(path.stat().st_size for path in paths) < _WORTH_THREADS:
        return map(digest_file, paths)
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        return list(pool.map(digest_file, paths))


def _is_plain(name: str) -> bool:
    """Whether `name` is a relative path in its shortest form that stays inside the folder."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and str(path) == name and name not in ("", ".", SUMS)


def shown(name: str) -> str:
    """A file's name for a message: what is no UTF-8 in it, no terminal can print."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def parse(text: bytes) -> dict[str, str]:
    """Maps path to digest.

    Only what `write` writes is read: lines of lower-case digest, two spaces, relative path; sorted, none twice.

    Raises:
        Refused: Anything else.
    """
    try:
        lines = text.decode("utf-8").split("\n")
    except UnicodeDecodeError:
        raise Refused(f"{SUMS}: not UTF-8; the bundle is damaged, get it again") from None
    if lines.pop() != "" or not lines:
        raise Refused(f"{SUMS}: empty or cut short; the bundle is damaged, get it again")
    sums: dict[str, str] = {}
    last = ""
    for number, line in enumerate(lines, 1):
        match = _LINE.fullmatch(line)
        if match is None or not _is_plain(match[2]):
            raise Refused(f"{SUMS}: line {number} is not 'digest  relative/path'; the bundle is damaged, get it again")
        if match[2] <= last:
            raise Refused(f"{SUMS}: line {number} is out of order or given twice; the bundle is damaged, get it again")
        last = match[2]
        sums[last] = match[1]
    return sums


def files_of(folder: Path) -> Iterator[str]:
    """Relative paths of all files below `folder`.

    Raises:
        Refused: A link, a device or another thing that is neither a file nor a folder, or a folder without files.
    """

    def walk(inside: Path, prefix: str) -> Iterator[str]:
        with os.scandir(inside) as scan:
            entries = sorted(scan, key=lambda entry: entry.name)
        if not entries and prefix:
            raise Refused(f"{prefix}: an empty folder does not belong to the bundle; get the bundle again")
        for entry in entries:
            name = prefix + entry.name
            mode = entry.stat(follow_symlinks=False).st_mode
            if stat.S_ISDIR(mode):
                yield from walk(inside / entry.name, name + "/")
            elif stat.S_ISREG(mode):
                yield name
            else:
                raise Refused(f"{name}: a link or special file does not belong to the bundle; get the bundle again")

    yield from walk(folder, "")


def write(folder: Path) -> str:
    """Writes SHA256SUMS over every other file below `folder`; returns the SHA-256 of SHA256SUMS itself."""
    names = sorted(name for name in files_of(folder) if name != SUMS)
    text = "".join(f"{digest_file(folder / name)}  {name}\n" for name in names).encode()
    parse(text)  # a name that could not be read back must not be sealed
    (folder / SUMS).write_bytes(text)
    return digest_bytes(text)


@dataclass(frozen=True)
class Sealed:
    """A folder whose files are those of its SHA256SUMS.

    Attributes:
        folder: Where it lies.
        sums: Path to digest, of every file but SHA256SUMS.
        root: SHA-256 of SHA256SUMS: names the bundle's whole content.
    """

    folder: Path
    sums: Mapping[str, str]
    root: str

    def read(self, name: str) -> bytes:
        """A file's content, whose digest is checked on the very bytes that are returned.

        Raises:
            Refused: Not listed, or changed since `open_sealed`.
        """
        if name not in self.sums:
            raise Refused(f"{name}: named in the bundle but not listed in {SUMS}; get the bundle again")
        try:
            data = (self.folder / name).read_bytes()
        except OSError as error:
            raise Refused(f"{name}: cannot be read ({error.strerror or error}); get the bundle again") from None
        if digest_bytes(data) != self.sums[name]:
            raise Refused(f"{name}: content does not match its digest in {SUMS}; get the bundle again")
        return data

    def copy(self, folder: Path) -> Path:
        """Writes the bundle's files, checked once more, into a new folder; returns it.

        Their modes are this process's: of a bundle that is protected against writing the copy can be replaced.

        Raises:
            Refused: A file was changed since `open_sealed`.
        """
        sums = (self.folder / SUMS).read_bytes()
        if digest_bytes(sums) != self.root:
            raise Refused(f"{SUMS}: was changed while it was read; get the bundle again")
        for name in self.sums:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.read(name))
        (folder / SUMS).write_bytes(sums)
        return folder

    def under(self, prefix: str) -> Iterator[str]:
        """Listed paths that start with `prefix`."""
        return (name for name in self.sums if name.startswith(prefix))


def _of_budgets(folder: Path) -> list[Path]:
    """The bundles in a run directory of several budgets."""
    return sorted(sealed.parent for sealed in folder.glob(f"*/bundle/{SUMS}"))


def open_sealed(folder: Path, *, check_content: bool = True) -> Sealed:
    """Checks a bundle against its SHA256SUMS before anything else of it is parsed.

    Args:
        folder: The bundle.
        check_content: False leaves the contents to `Sealed.read`, file by file; the set of files is checked anyway.

    Raises:
        BadInput: There is no such folder.
        Refused: A file is missing, added, changed or no plain file, or SHA256SUMS is not strictly what it must be.
    """
    folder = Path(folder)
    root = folder / SUMS
    try:
        if not folder.is_dir():
            raise BadInput(f"{folder}: no such bundle (a folder that holds {SUMS})")
        if not stat.S_ISREG(root.lstat().st_mode) or root.stat().st_size > _MAX_SUMS:
            raise Refused(f"{SUMS}: not a plain file of reasonable size; get the bundle again")
        text = root.read_bytes()
    except FileNotFoundError:
        inner = [folder / "bundle"] if (folder / "bundle" / SUMS).is_file() else _of_budgets(folder)
        meant = f"; did you mean {' or '.join(map(str, inner))}?" if inner else ""
        raise Refused(f"{folder}: no {SUMS} in it, so this is no sealed bundle{meant}") from None
    except OSError as error:
        raise Refused(f"{error.filename or root}: cannot be read ({error.strerror or error})") from None
    sums = parse(text)
    try:
        present = {name for name in files_of(folder) if name != SUMS}
        for name in sorted(sums.keys() - present):
            raise Refused(f"{shown(name)}: listed in {SUMS} but missing; get the bundle again")
        for name in sorted(present - sums.keys()):
            raise Refused(f"{shown(name)}: not listed in {SUMS}; remove it or get the bundle again")
        if check_content:
            for (name, expected), found in zip(sums.items(), _digests([folder / name for name in sums]), strict=True):
                if found != expected:
                    raise Refused(f"{name}: content does not match its digest in {SUMS}; get the bundle again")
    except OSError as error:
        raise Refused(f"{error.filename or folder}: cannot be read ({error.strerror or error})") from None
    return Sealed(folder, sums, digest_bytes(text))
