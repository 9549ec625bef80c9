"""Puts a folder in place of another in one step."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import tempfile
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def _exchange(a: Path, b: Path) -> bool:
    """Swaps two paths atomically (Linux's renameat2); False where the system or file system can't."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0


def _remove(path: Path) -> None:
    """As far as it can be: a server may have left files of its own user in what it served."""
    if path.is_symlink():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def replace_folder(new: Path, folder: Path) -> None:
    """Moves `new` to `folder`; what was there is removed once the new one is in its place.

    A reader finds the old folder or the new one, never a mixture. Where the system can't swap two folders in one step,
    there is a moment in which neither is there, and the old one is kept in a hidden folder beside `new` until it is
    over. Of a symbolic link the link is replaced; what it points to stays.
    """
    if not os.path.lexists(folder):
        new.rename(folder)
        return
    if _exchange(new, folder):
        _remove(new)
        return
    beside = Path(tempfile.mkdtemp(dir=new.parent, prefix=f".{folder.name}.old."))
    aside = beside / folder.name
    try:
        folder.rename(aside)
        try:
            new.rename(folder)
        except OSError:
            aside.rename(folder)
            raise
        _remove(aside)
    finally:
        with contextlib.suppress(OSError):
            beside.rmdir()
