"""Where a user's cache is: measurements, kernels and data sets that later runs find again."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache() -> Path:
    """passdeploy's folder in the user's cache (not created), which is ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    given = os.environ.get("XDG_CACHE_HOME")
    return (Path(given) if given else _home() / ".cache") / "passdeploy"


def _home() -> Path:
    """The root for a user who has no home, as a number without an account, which is what container runtimes say too."""
    try:
        return Path.home()
    except RuntimeError:
        return Path("/")
