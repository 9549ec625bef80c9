"""What a person sees while stages run: one line per stage with the time left, and plain sentences."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

REDRAW = 0.1
"""Seconds between two redrawings of the progress bar."""

STAGES = {
    "dense": "the dense network and its accuracy",
    "profile": "latency model of the target",
    "search": "what to keep",
    "alternatives": "the dense network in lower precisions",
    "fit": "close the loop on the budget",
    "finetune": "fine-tune the thin network",
    "compile": "compile and prove",
    "bench": "time the engine that ships",
    "report": "report",
    "ship": "bundle",
}


class Ui:
    """Shows progress on stderr. Quiet (``--json``) shows nothing.

    Args:
        quiet: Show nothing at all.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet, highlight=False, emoji=False)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._last_line = 0.0
        self._drawn = 0.0

    def say(self, sentence: str) -> None:
        """One plain sentence."""
        self.console.print(sentence, markup=False, soft_wrap=True)

    def skipped(self, stage: str) -> None:
        """The stage's result is still good."""
        self.console.print(f"[green]=[/] {stage:<9} unchanged, kept")

    @contextmanager
    def stage(self, stage: str) -> Iterator[None]:
        """Shows a stage while it runs; its steps redraw it, since a thread would be timed with the engines."""
        title = STAGES.get(stage, stage)
        start = time.monotonic()
        with Progress(
            TextColumn(f"{stage:<9} {{task.description}}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[state]}"),
            console=self.console,
            transient=True,
            auto_refresh=False,
            disable=self.console.quiet or not self.console.is_terminal,
        ) as self._progress:
            self._task = self._progress.add_task(title, total=None, state="")
            if not self.console.is_terminal:
                self.say(f"> {stage:<9} {title}")
            try:
                yield
            finally:
                self._progress = None
        self.console.print(f"[green]+[/] {stage:<9} {title} [dim]({time.monotonic() - start:.1f} s)[/]")

    def step(self, done: int, total: int, state: str = "") -> None:
        """Progress inside the current stage."""
        now = time.monotonic()
        if self._progress is not None and self._task is not None:
            due = now - self._drawn >= REDRAW or done >= total
            self._progress.update(self._task, completed=done, total=total, state=state, refresh=due)
            self._drawn = now if due else self._drawn
        if not self.console.is_terminal and not self.console.quiet and now - self._last_line > 20:
            self._last_line = now
            self.say(f"  {done}/{total} {state}")
