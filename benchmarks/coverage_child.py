"""The process of one network in `benchmarks/coverage.py`: with limits, its output kept in files."""

from __future__ import annotations

import gc
import os
import resource
import sys
from pathlib import Path


def work(what: str, name: str, folder: str, cpu_s: int, memory: int) -> None:
    """Runs a step of `coverage_model` with limits on CPU time and memory (bytes); output goes to files in `folder`."""
    for stream, kind in ((sys.stdout, "out"), (sys.stderr, "err")):
        stream.flush()
        with Path(folder, f"{what}.{kind}").open("w") as file:
            os.dup2(file.fileno(), stream.fileno())
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 30))
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    gc.disable()  # graphs are large and short-lived: collecting takes a tenth of the time
    from coverage_model import main

    main([what, name, folder])
