"""What a person sees, and what it costs the engines that are timed meanwhile."""

from __future__ import annotations

import io
import threading

import pytest
from rich.console import Console

from passdeploy.console import Ui


@pytest.fixture
def ui() -> Ui:
    """On a terminal."""
    shown = Ui()
    shown.console = Console(file=io.StringIO(), force_terminal=True, width=120)
    return shown


def test_a_stage_on_a_terminal_starts_no_thread(ui: Ui) -> None:
    before = set(threading.enumerate())
    with ui.stage("profile"):
        ui.step(1, 4)
        assert set(threading.enumerate()) == before


def test_steps_are_drawn_by_the_one_who_takes_them(ui: Ui) -> None:
    assert isinstance(ui.console.file, io.StringIO)
    with ui.stage("profile"):
        ui.step(1, 4, "first structure")
        assert "first structure" in ui.console.file.getvalue()
        for done in range(2, 1000):
            ui.step(done, 1000)
        drawn = ui.console.file.getvalue().count("latency model of the target")
        assert drawn < 500, "not at every step"
        ui.step(1000, 1000, "last structure")
        assert "last structure" in ui.console.file.getvalue()
