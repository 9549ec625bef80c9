"""Whether weights lie in huge pages, which changes the latency of networks that do not fit a CPU's caches.

In small pages a CPU looks up where its next weights lie every 4 KiB, and how the pages of a process happen to lie in
memory makes one and the same engine some per cent slower or faster; with huge ones it is faster, and repeats better
(docs/latency.md). Linux hands them out to everybody, or to whoever asks; the GNU C library asks for all large blocks of
a process that was started with `ASK`.
"""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

VARIABLE, VALUE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"
"""What to set before a process starts; of glibc 2.35 and later (its manual, "Memory Allocation Tunables")."""
ASK = f"{VARIABLE}={VALUE}"
_ASKED = re.compile(r"(^|:)glibc\.malloc\.hugetlb=[12](:|$)")
_MODE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def mode() -> str | None:
    """Who gets huge pages: ``always``, ``madvise`` (whoever asks) or ``never``; None where the system does not say."""
    try:
        chosen = re.search(r"\[(\w+)\]", _MODE.read_text())
    except OSError:
        return None
    return chosen[1] if chosen else None


def _can_ask() -> bool:
    name, version = platform.libc_ver()
    return name == "glibc" and tuple(int(part) for part in re.findall(r"\d+", version)[:2]) >= (2, 35)


def used() -> bool:
    """Whether large blocks of this process's memory come in huge pages."""
    given = mode()
    if given == "madvise":
        return _ASKED.search(os.environ.get(VARIABLE, "")) is not None and _can_ask()
    return given == "always"


def advice() -> str | None:
    """What to do, as a shell takes it, for weights to lie in huge pages; None where they do, or nothing helps."""
    given = mode()
    if given is None or used() or not _can_ask():
        return None
    allow = "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled; " if given == "never" else ""
    return f"{allow}export {ASK}"
