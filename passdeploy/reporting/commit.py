"""The commit that a run belongs to: what the trend over commits is drawn along."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

_HASH = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")


def current_commit(folder: Path | None = None, environ: Mapping[str, str] | None = None) -> str | None:
    """The commit checked out in `folder` (default: the working directory), with ``+`` when files differ from it.

    Inside GitHub Actions ``$GITHUB_SHA`` decides. None outside a repository or without git.
    """
    given = (os.environ if environ is None else environ).get("GITHUB_SHA", "")
    if _HASH.fullmatch(given):
        return given
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None or not _HASH.fullmatch(commit):
        return None
    return commit + ("+" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")


def _git(folder: Path | None, *arguments: str) -> str | None:
    command = ["git", "--no-optional-locks", *arguments]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
