"""Child processes for compilers that can take the whole process down with them.

TensorRT aborts or exits on some errors and keeps GPU memory until its process ends. So it is never loaded here: a job
runs in a fresh Python, and whatever goes wrong there arrives as one line.
"""

from __future__ import annotations

import ctypes
import errno
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import passdeploy
from passdeploy.engines._common import one_line
from passdeploy.errors import BadInput, NotWritten, PassdeployError, Unavailable

BUILD_TIMEOUT_S = 3600.0
"""A full TensorRT build of a large network takes minutes; an hour means that it hangs."""
CALL_TIMEOUT_S = 600.0
PATIENCE_S = 10.0
"""For a child to end by itself, once its pipe is closed."""
PR_SET_PDEATHSIG = 1
"""Of Linux's ``prctl``."""
_KINDS: dict[str, type[PassdeployError]] = {"NotWritten": NotWritten, "BadInput": BadInput, "Unavailable": Unavailable}


def environment(extra: Mapping[str, str]) -> dict[str, str]:
    """The child's environment: this one, with this very passdeploy on the path."""
    root = str(Path(passdeploy.__path__[0]).parent)
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    # Safe: else `python -m` looks into the working folder first, where a user's statistics.py or onnx/ may lie.
    return {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", **extra}


def _give_back() -> None:
    """Lets go of GPU memory that PyTorch keeps for later in this process: the child finds it taken, on the same card.

    After a search that is most of the card, and nothing of it is in use.
    """
    torch = sys.modules.get("torch")  # not imported for this: without it nothing is kept
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def library_complaint(text: str) -> str:
    """The most telling line of what a compiler wrote before it failed.

    The error that names a node, else the first error, else the last line.
    """
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith(("Traceback", "File ", "^", "~"))]
    errors = [line for line in lines if re.match(r"\[?(\[E\]|E\]|\[F\]|ERROR)", line)]
    named = [line for line in errors if "with name:" in line]
    told = (named or errors or lines[-1:] or [""])[0]
    return told and one_line(re.sub(r"^\[[EF]\]\s*", "", told))


def raise_answer(answer: dict[str, Any], who: str, output: str = "") -> dict[str, Any]:
    """Returns the child's answer, or raises the error that it holds."""
    if "error" not in answer:
        return answer
    told = library_complaint(output)
    detail = f"{answer['error']} ({told})" if told and told not in answer["error"] else answer["error"]
    raise _KINDS.get(answer.get("kind", ""), BadInput)(f"{who}: {detail}")


def died(who: str, code: int, output: str) -> BadInput:
    """The error for a child that ended without an answer."""
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"
    if -code == signal.SIGKILL:
        how += ", perhaps for want of memory"
    return BadInput(f"{who}: its process {how}: {library_complaint(output) or 'it said nothing'}")


def run_job(
    module: str,
    job: dict[str, Any],
    who: str,
    *,
    env: Mapping[str, str] = MappingProxyType({}),
    timeout: float = BUILD_TIMEOUT_S,
) -> Any:
    """Runs ``python -m module JOB.json RESULT.json PARENT`` and returns the result.

    Args:
        module: Reads the job, writes the result: JSON both.
        job: For the child.
        who: Begins error messages.
        env: Added to its environment.
        timeout: Seconds after which the child is ended.

    Raises:
        BadInput: What the child reports, or that it crashed or took too long.
        NotWritten: The disk is full.
    """
    _give_back()
    with tempfile.TemporaryDirectory(prefix="passdeploy-child-") as folder:
        question, answer = Path(folder, "job.json"), Path(folder, "result.json")
        question.write_text(json.dumps(job), encoding="utf-8")
        command = [sys.executable, "-m", module, str(question), str(answer), str(os.getpid())]
        try:
            done = subprocess.run(
                command,
                env=environment(env),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                timeout=timeout,
            )
        except subprocess.TimeoutExpired:
            raise BadInput(f"{who}: no result after {timeout:.0f} s, ended; try a smaller network or batch") from None
        try:
            told = json.loads(answer.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):  # none, or what a full disk left of it
            full = os.strerror(errno.ENOSPC)
            if full in done.stdout:
                raise NotWritten(f"{who}: {full}: {folder}; free some space") from None
            raise died(who, done.returncode, done.stdout) from None
        return raise_answer(told, who, done.stdout)


def answer_job(do: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """The child's side of `run_job`: answers the job named on the command line with what `do` makes of it."""
    question, answer = map(Path, sys.argv[1:3])
    _die_with(int(sys.argv[3]))
    try:
        found = do(json.loads(question.read_text(encoding="utf-8")))
    except Exception as error:
        found = failure(error)
    answer.write_text(json.dumps(found), encoding="utf-8")


def _die_with(parent: int) -> None:
    """Has the kernel (Linux's) end this process with its parent, which may be killed without a chance to do so.

    Nobody would read the answer, and a build keeps a GPU for up to `BUILD_TIMEOUT_S`. A `Server` needs no such thing:
    its pipe closes.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it went before that
        os._exit(1)


class Server:
    """A child that keeps engines loaded and answers requests over a pipe.

    Engines that are compared live in the same child, so that their blocks alternate in one process on one GPU context.

    Args:
        module: Started with the pipe's file descriptor as its argument; see `serve`.
        who: Begins error messages.
        env: Added to its environment.
    """

    def __init__(self, module: str, who: str, env: Mapping[str, str]) -> None:
        self.who = who
        self.users = 0
        _give_back()
        self._answered = 0
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self._pipe, theirs = multiprocessing.Pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, str(theirs.fileno())],
            env=environment(env),
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        theirs.close()

    def _output(self) -> str:
        """What the child has written since its last answer: what it said of earlier requests explains nothing now."""
        if self._log.closed:  # ended, as it did not answer
            return ""
        # No seek: where this file is read next is where the child writes next.
        length = self._size() - self._answered
        return os.pread(self._log.fileno(), length, self._answered).decode(errors="replace")

    def _size(self) -> int:
        return os.fstat(self._log.fileno()).st_size

    def ask(self, verb: str, *arguments: Any, timeout: float = CALL_TIMEOUT_S) -> Any:
        """Sends a request and returns its value.

        Raises:
            BadInput: What the child reports, or that it died or does not answer.
        """
        try:
            self._pipe.send((verb, arguments))
            if not self._pipe.poll(timeout):
                self.stop(patience=0)
                raise BadInput(f"{self.who}: no answer to {verb} after {timeout:.0f} s; its process was ended")
            answer = self._pipe.recv()
        except KeyboardInterrupt:  # its answer may still come, and would be taken for that to the next request
            self.stop(patience=0)
            raise
        except (EOFError, OSError):  # it is gone, or the pipe was closed after it did not answer
            code = self._end(PATIENCE_S)
            raise died(self.who, code, self._output()) from None
        output = self._output() if "error" in answer else ""
        self._answered = self._size()
        return raise_answer(answer, self.who, output)["value"]

    def stop(self, patience: float = PATIENCE_S) -> None:
        """Ends the child: asks it by closing the pipe, and kills it after `patience` seconds."""
        self._pipe.close()
        self._end(patience)
        self._log.close()

    def _end(self, patience: float) -> int:
        """Waits for the child, and kills it after `patience` seconds; returns its exit status."""
        try:
            return self._process.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


def serve(descriptor: int, verbs: dict[str, Any]) -> None:
    """The child's side of `Server`: answers requests with `verbs` until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it closes the pipe
    pipe = multiprocessing.connection.Connection(descriptor)
    while True:
        try:
            verb, arguments = pipe.recv()
        except (EOFError, ConnectionResetError):
            return
        try:
            answer = {"value": verbs[verb](*arguments)}
        except Exception as error:
            answer = failure(error)
        pipe.send(answer)


def failure(error: Exception) -> dict[str, Any]:
    """An exception as an answer."""
    kind = next((cls.__name__ for cls in type(error).__mro__ if cls.__name__ in _KINDS), "")
    if isinstance(error, OSError) and error.errno in NotWritten.ERRNOS:
        kind = "NotWritten"
    return {"error": one_line(error), "kind": kind}
