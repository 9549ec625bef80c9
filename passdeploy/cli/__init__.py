"""The command line: parses, calls, prints. No logic; heavy libraries are imported by the command that needs them."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import traceback
from typing import NoReturn

# Before torch is imported: spinning threads of one library spoil the other's measurements. A spin of some ten
# microseconds does no harm, and saves a training step the sleep between two operators (a fifth of it on two cores).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
os.environ.setdefault("KMP_BLOCKTIME", "0")

import typer
from rich.console import Console

# Each module registers its commands, and --help lists them in this order.
# isort: off
from passdeploy.cli import running, measuring, delivering, studying, inspecting  # noqa: F401

# isort: on
from passdeploy.cli.options import app, only_results, print_json
from passdeploy.errors import BadInput, NotWritten, PassdeployError, Terminated

INTERRUPTED, TERMINATED = 130, 143
SYSTEM = NotWritten.ERRNOS | {errno.EACCES, errno.EPERM}
"""Errors of the operating system that are the machine's: no mistake of ours, wherever they come up."""
CONTINUED = ("run", "profile", "search", "fit", "finetune", "compile", "compare", "study")
"""Verbs that keep in a folder what they have done so far; the others start over."""


class InternalError(PassdeployError):
    """A mistake of ours: never the status that says that a goal was not met."""

    exit_code = 70  # EX_SOFTWARE of sysexits.h


def _terminate(*_: object) -> NoReturn:
    """On SIGTERM: leaves by the way out, on which child processes are ended, instead of at once."""
    raise Terminated(TERMINATED)


def fail(error: PassdeployError, as_json: bool) -> NoReturn:
    """Prints one line and exits."""
    line = " ".join(str(error).split())
    if as_json:
        with contextlib.suppress(OSError):  # the error may be that nothing can be written there
            print_json({"error": line, "kind": type(error).__name__})
    Console(stderr=True, highlight=False, emoji=False).print("[bold red]error:[/] ", end="")
    Console(stderr=True, highlight=False, emoji=False).print(line, markup=False, soft_wrap=True)
    raise SystemExit(error.exit_code)


def out_of_memory(error: Exception) -> bool:
    """Whether it says that memory is short: torch says so of a GPU and of a CPU in different ways."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )


def main() -> None:
    """Entry point: errors become one line and an exit status."""
    try:
        from typer._click import ClickException
    except ImportError:  # typer before it brought its own
        from click import ClickException  # type: ignore[assignment]

    signal.signal(signal.SIGTERM, _terminate)
    debug, as_json = "--debug" in sys.argv, "--json" in sys.argv
    try:
        with only_results() if as_json and "--help" not in sys.argv else contextlib.nullcontext():
            code = app(standalone_mode=False)
    except typer.Exit as error:
        raise SystemExit(error.exit_code) from None
    except ClickException as error:
        if not sys.argv[1:]:  # no verb: the help, as it is
            print(error.format_message())
            raise SystemExit(0) from None
        verbs = {command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands}
        verb = "".join(f" {word}" for word in sys.argv[1:2] if word in verbs)
        fail(BadInput(f"{error.format_message().rstrip('.')}; see passdeploy{verb} --help"), as_json)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except PassdeployError as error:
        if debug:
            traceback.print_exc()
        fail(error, as_json)
    except Exception as error:
        if debug:  # the status stays what it is: that of an uncaught error says that a goal was not met
            traceback.print_exc()
        if isinstance(error, OSError) and error.errno in SYSTEM:
            name = error.filename or "writing"
            fix = "free some space" if error.errno in NotWritten.ERRNOS else "check who may read and write it"
            fail(BadInput(f"{name}: {error.strerror}; {fix}"), as_json)
        if out_of_memory(error):
            fail(BadInput("out of memory: lower train_batch or --batch, or use a smaller network"), as_json)
        said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        fail(InternalError(f"internal error: {said}; --debug shows where"), as_json)
    if code == INTERRUPTED:  # typer turns Ctrl-C into this status, silently
        same = "the same command without --fresh" if "--fresh" in sys.argv else "the same command"
        then = f": {same} continues where it stopped" if {*sys.argv[1:2]} & {*CONTINUED} else ""
        Console(stderr=True, emoji=False).print(f"interrupted{then}")
    raise SystemExit(code if isinstance(code, int) else 0)
