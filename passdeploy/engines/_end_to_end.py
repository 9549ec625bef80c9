"""Scope `end_to_end`: an inference with its transfers, inputs from and outputs to the host's memory."""

from __future__ import annotations

from collections.abc import Callable

from passdeploy.engines.base import Arrays, Runner


class EndToEnd(Runner):
    """Times whole runs of a runner.

    A runner that can time them itself (`end_to_end_block`: in its own process, without the pipe in between) does.

    Attributes:
        block: The runner's own, as `passdeploy.latency.measure` looks for it; None: `call` is timed.

    Args:
        runner: Closed with this one.
        inputs: One batch.
    """

    block: Callable[[float, int], list[float]] | None

    def __init__(self, runner: Runner, inputs: Arrays) -> None:
        self.runner, self.inputs = runner, inputs
        self.block = getattr(runner, "end_to_end_block", None)
        if self.block is not None:
            runner.bind(inputs)

    def call(self) -> None:
        self.runner.run(self.inputs)

    def close(self) -> None:
        self.runner.close()
