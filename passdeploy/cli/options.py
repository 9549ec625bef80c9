"""What the commands share: the app, flags that several of them take, and how results are printed."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console

import passdeploy

app = typer.Typer(
    name="passdeploy",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
out_console = Console(highlight=False, emoji=False)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(passdeploy.__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Makes a trained vision network meet a latency on real hardware, and proves each step on the way."""


Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, nothing else.")]
Out = Annotated[Path, typer.Option("--out", help="Run directory.")]
Config = Annotated[Path | None, typer.Option(help="YAML file (default: ./passdeploy.yaml).")]

Model = Annotated[str | None, typer.Option("--model", help="A name, or module:function that returns an nn.Module.")]
Weights = Annotated[str | None, typer.Option(help="Weights: safetensors, or a tensor-only .pth.")]
Data = Annotated[str | None, typer.Option(help="A name, a folder of images, or module:function.")]
Target = Annotated[str | None, typer.Option(help="cpu, gpu (the first one here), a100, ... (passdeploy targets).")]
Backend = Annotated[str | None, typer.Option(help="onnxruntime, openvino, inductor, tensorrt_rtx, ...")]
Precision = Annotated[str | None, typer.Option(help="fp32 (default on a CPU), fp16 (on a GPU), bf16, int8, fp8.")]
Batch = Annotated[int | None, typer.Option(help="Images per inference; default: 1.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads of one inference; default: 1.")]
Epochs = Annotated[float | None, typer.Option(help="Fine-tuning: passes over the training data.")]
SearchEpochs = Annotated[float | None, typer.Option("--search-epochs", help="Search: passes over the training data.")]

Exclude = Annotated[list[str] | None, typer.Option(help="Module or pattern that stays whole; repeatable.")]
MinWidth = Annotated[list[str] | None, typer.Option(help="Channels to keep at least, NAME=CHANNELS; repeatable.")]
FixedWidth = Annotated[list[str] | None, typer.Option(help="Channels to keep exactly, NAME=CHANNELS; repeatable.")]
Tie = Annotated[list[str] | None, typer.Option(help="Layers that keep the same channels, NAME,NAME; repeatable.")]


_results: ContextVar[TextIO | None] = ContextVar("stdout", default=None)


@contextlib.contextmanager
def only_results() -> Iterator[None]:
    """Until its end stdout gets what `write_result` writes only; what a user's module prints goes to stderr."""
    token = _results.set(sys.stdout)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        _results.reset(token)


def write_result(text: str) -> None:
    """Writes to stdout what a command was asked for."""
    stream = _results.get() or sys.stdout
    if isinstance(stream, io.TextIOWrapper):  # files for other programs, whatever this machine's locale
        stream.reconfigure(encoding="utf-8")
    stream.write(text)
    stream.flush()  # a disk that is full says so now, not when nobody listens any more


def print_json(value: object) -> None:
    """The one thing that a command with ``--json`` writes to stdout."""
    write_result(json.dumps(value, indent=1) + "\n")


def values(**flags: Any) -> dict[str, Any]:
    """Flags that were given, as configuration values."""
    return {key: value for key, value in flags.items() if value is not None}


def configuration(config: Path | None, flags: dict[str, Any], console: bool = True, needs_data: bool = True) -> Any:
    """File, then flags; the embedded demo when neither names a model or data."""
    from passdeploy.api import configure

    made, note = configure(config, flags, needs_data)
    if note and console:
        Console(stderr=True, highlight=False, emoji=False).print(note, markup=False, soft_wrap=True)
    return made
