"""Errors a user can act on.

Every message is one line: what is wrong, where, and what to do about it. The CLI prints it and exits with
``exit_code``; the traceback is shown with ``--debug`` only.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable


class PassdeployError(Exception):
    """Base of all errors whose message is meant for the user."""

    exit_code = 1


class BadInput(PassdeployError):
    """What the user gave can't be used as it is (exit 2)."""

    exit_code = 2


class Terminated(SystemExit):
    """The process was asked to end, by SIGTERM: unlike other exits never a mistake in the user's own code."""


class NotWritten(BadInput):
    """The disk takes no more: whatever comes next would fail as well."""

    ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO})
    """By which the operating system says so."""


class DenseFailed(BadInput):
    """The dense engine can't be measured: that says nothing of the structure that was to be held against it."""


class NotEquivalent(PassdeployError):
    """A step does not compute the same function as the one before it (exit 1, nothing is shipped)."""


class Unavailable(PassdeployError):
    """A backend, device or optional package is missing on this machine (exit 2, says how to get it)."""

    exit_code = 2


def nearest(name: str, known: Iterable[str], limit: int = 3) -> str:
    """Returns ``"; did you mean a, b?"`` for the names nearest to `name`, else the start of the list of known ones."""
    known = sorted(known)
    close = difflib.get_close_matches(name.lower(), [k.lower() for k in known], n=limit, cutoff=0.5)
    by_lower = {k.lower(): k for k in known}
    if close:
        return f"; did you mean {', '.join(by_lower[c] for c in close)}?"
    shown = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
    return f"; known: {shown}" if known else ""
