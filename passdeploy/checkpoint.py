"""State of a training that is under way, so that a run that was killed goes on from it."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

import torch

from passdeploy.workspace import write_atomic


class Checkpoint:
    """A file with the state of a long loop, replaced atomically.

    Args:
        path: Where it lies; None: nothing is kept.
        every_s: Shortest time between two saves.
        times_its_cost: Likewise, in times that the last save took: that of a large network takes seconds.
    """

    def __init__(self, path: Path | None, every_s: float = 15.0, times_its_cost: float = 20.0) -> None:
        self.path = path
        self.times_its_cost = times_its_cost
        self._wait = self.every_s = every_s
        self._last = time.monotonic()

    def load(self) -> dict[str, Any] | None:
        """The last saved state; None when there is none. Tensors, on the CPU, and plain containers only."""
        if self.path is None or not self.path.exists():
            return None
        # A run that was begun on a GPU may go on where there is none; who takes a state copies it to its own device.
        state: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
        return state

    def due(self) -> bool:
        """Whether it is time to save again."""
        return self.path is not None and time.monotonic() - self._last >= self._wait

    def save(self, state: dict[str, Any]) -> None:
        if self.path is None:
            return
        start = time.monotonic()
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomic(self.path, buffer.getbuffer())
        self._last = time.monotonic()
        self._wait = max(self.every_s, self.times_its_cost * (self._last - start))
