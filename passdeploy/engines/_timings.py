"""TensorRT's kernel timings, which builds share through a file: an extra, for whose want no build fails.

Polygraphy would open the file's lock before it builds and write the file after, and where either fails the engine is
lost with it: on a disk that has filled up meanwhile, or beside a lock that another user has left.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

from passdeploy.engines._common import one_line
from passdeploy.workspace import write_atomic


def own_copy(shared: str, folder: Path) -> str:
    """A copy of the shared timings that is read in place of them; one that is not there where they can't be read."""
    copy = folder / "timings"
    with contextlib.suppress(OSError):
        shutil.copyfile(shared, copy)
    return str(copy)


def keep(config: Any, shared: str) -> str | None:
    """Adds what a build has timed to the shared file.

    Args:
        config: The build's `IBuilderConfig`.
        shared: The file; replaced whole, under the lock that Polygraphy takes.

    Returns:
        Why it could not be done; None: it was.
    """
    from polygraphy import util

    path = Path(shared)
    try:
        timings = config.get_timing_cache()
        if timings is None:
            return None
        with util.LockFile(shared):
            before = config.create_timing_cache(path.read_bytes()) if path.exists() else None
            if before is not None:
                timings.combine(before, ignore_mismatch=True)
            with timings.serialize() as content:
                write_atomic(path, memoryview(content))
    except Exception as error:  # the disk's, or the library's of what another version has left there
        why = str(error).partition(";")[0] or type(error).__name__  # without the advice to choose another --out
        return f"kernel timings are not kept for later builds, which take longer: {one_line(why)}"
    return None
