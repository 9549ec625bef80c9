"""The trials of all budgets of a search: which blocks go, and how many of its steps that took."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from passdeploy.search.method import SearchContext
from passdeploy.search.race import Entrant, Race
from passdeploy.search.state import State
from passdeploy.teacher import Teacher
from passdeploy.training import TrainSettings

SHARE = 0.75
"""Of a search's steps, what its trials may take."""
DROPPED = 0.5
"""The same where several budgets share the weights, so that what trials train is dropped: half as much."""
SETTLED = 0.25
"""Share of the steps that go to the hypernetwork where trials have trained the weights within the budget already: a
step in which masks may still change is worth less to the weights than one of fine-tuning."""


class Trials:
    """Decides, for each budget on its own, and counts.

    With one budget the winner's training goes on; several share their weights, which start as the dense network's.

    Args:
        context: Of the search.
        search: What is trained in it.
        teacher: None without distillation.
        settings: Of the search's training.
        total: The search's steps.

    Attributes:
        start: The first step that is left to the search.
        spent: Steps that trials took and that the weights do not have.
        unspent: Steps that are left to fine-tuning.
    """

    def __init__(
        self, context: SearchContext, search: State, teacher: Teacher | None, settings: TrainSettings, total: int
    ) -> None:
        self.context, self.search, self.teacher, self.settings = context, search, teacher, settings
        self.total, self.start, self.spent, self.unspent = total, 0, 0, 0
        self._races: list[dict[str, Any]] = []  # per budget: blocks that stay or go, what deciding it took, a message

    def decide(self, saved: dict[str, Any] | None) -> Entrant | None:
        """Decides what is not decided yet; returns the winner where its training goes on.

        Args:
            saved: From a checkpoint that was written under way.
        """
        self._races, left = (saved["races"], saved["race"]) if saved is not None else ([], None)
        budgets, goes_on = len(self.context.ratios), None
        for which in range(len(self._races), budgets):
            ratio, steps = self.context.ratios[which], SHARE * (1.0 if budgets == 1 else DROPPED) * self.total / budgets
            race = Race(self.context, self.search, self.teacher, self.settings, ratio, steps)
            if left is not None:
                race.resume(left)
                left = None
            race.run(partial(self._tried, race))
            won = race.entrants[0] if race.entrants else None
            told = "" if budgets == 1 else f"at {1 / ratio:.2f}x "
            message = "" if won is None else told + race.told()
            self._races.append({"blocks": won.blocks if won else {}, "spent": race.spent, "message": message})
            if won is not None and budgets == 1:
                race.carry_over()
                goes_on, self.start = won, race.steps
            race.training.clear()  # before the next one's networks are made
        taken = math.ceil(sum(race["spent"] for race in self._races))
        self.spent = taken - self.start
        if goes_on is not None:
            self.unspent = max(0, self.total - taken - round(SETTLED * self.total))
        return goes_on

    def _tried(self, race: Race) -> None:
        """After each step of a race."""
        done = sum(each["spent"] for each in self._races) + race.spent
        self.context.progress(round(done), self.total, f"trying which blocks go: {len(race.entrants)} sets")
        if self.context.checkpoint.due():
            trials = {"races": self._races, "race": race.state()}
            self.context.checkpoint.save({"step": 0, "trials": trials})

    @property
    def end(self) -> int:
        """The first step that is not the search's any more."""
        return self.total - self.spent - self.unspent

    def blocks(self, which: int) -> dict[str, bool]:
        """Per depth group whether it stays, where that is decided for a budget."""
        blocks: dict[str, bool] = self._races[which]["blocks"]
        return blocks

    def health(self) -> list[dict[str, Any]]:
        """What came of them, for the report."""
        messages = [race["message"] for race in self._races if race["message"]]
        return [{"name": "blocks tried", "ok": True, "message": message} for message in messages]

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds once all is decided."""
        return {"races": self._races, "start": self.start, "spent": self.spent, "unspent": self.unspent}

    def resume(self, state: dict[str, Any]) -> None:
        """Goes on from what `state` gave."""
        self._races, self.start = state["races"], state["start"]
        self.spent, self.unspent = state["spent"], state["unspent"]
