"""Keeps two processes from working in one run directory, where they would remove each other's half-finished files, and
lets them write to one file in turn."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from passdeploy.errors import BadInput

LOCK = ".lock"

_held: dict[Path, tuple[int, int]] = {}
"""Of this process, by folder: the open lock file, and how many hold it."""


def _forget() -> None:
    """In a fork: its parent holds the locks, and must not need the fork to end before they are free."""
    for descriptor, _ in _held.values():
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget)


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Holds a folder for this process, which may do so several times over; a process that dies lets go of it.

    Args:
        folder: Existing. A hidden file in it is locked, and removed at the end.

    Raises:
        BadInput: Another process holds it.
    """
    folder = folder.resolve()
    descriptor, holders = _held.get(folder) or (_lock(folder), 0)
    if descriptor is None:
        yield
        return
    _held[folder] = descriptor, holders + 1
    try:
        yield
    finally:
        # A fork that leaves a block which its parent entered has nothing to let go of.
        if folder in _held:
            descriptor, holders = _held[folder]
            if holders > 1:
                _held[folder] = descriptor, holders - 1
            else:
                del _held[folder]
                with contextlib.suppress(OSError):
                    (folder / LOCK).unlink()  # while it is still locked: nobody else can have it
                os.close(descriptor)


def _lock(folder: Path) -> int | None:
    """Opens and locks the folder's lock file; None where the file system knows no locks."""
    path = folder / LOCK
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise BadInput(f"--out {folder}: cannot be written ({error.strerror}); choose another folder") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.pread(descriptor, 20, 0).decode(errors="replace") or "unknown"
            os.close(descriptor)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                return None
            raise BadInput(
                f"--out {folder}: another passdeploy works in it (pid {owner}); "
                "wait until it has ended, or give another --out"
            ) from None
        if _is(descriptor, path):
            with contextlib.suppress(OSError):  # on a full disk it is a lock without a name on it
                os.ftruncate(descriptor, 0)
                os.write(descriptor, str(os.getpid()).encode())
            return descriptor
        os.close(descriptor)  # its holder removed it between our opening and our locking it


def _is(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def in_turn(path: Path) -> Iterator[None]:
    """Waits until no other process of this user on this machine is in such a block for the file.

    The lock lies in the system's temporary folder, so that nothing is left beside the file; where locks can't be had,
    nobody waits.
    """
    named = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            lock = Path(tempfile.gettempdir()) / f"passdeploy-turn-{os.getuid()}-{named}.lock"
            # Everybody may write there: of a link by that name what it points to is left alone.
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
