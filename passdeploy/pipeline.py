"""The stages in order. Each is a function of recorded inputs that writes into its own folder.

dense -> profile -> search -> alternatives -> per budget: fit -> finetune -> compile -> bench -> report -> ship
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import torch
import yaml
from safetensors.torch import load_file

from passdeploy.budget import FASTEST, Budget, parse_budgets
from passdeploy.config import RunConfig
from passdeploy.console import Ui
from passdeploy.data.base import ImageData, evenly
from passdeploy.dependencies import (
    BUDGET_STAGES,
    SHARED_STAGES,
    inputs_of,
    skipped,
    starts_over,
    stopped_by,
    target_facts,
    unmeasurable,
)
from passdeploy.engines._quantize import CALIBRATION_IMAGES
from passdeploy.errors import BadInput, PassdeployError
from passdeploy.export import OnnxSlicer
from passdeploy.final_copies import copy_final
from passdeploy.locking import exclusive
from passdeploy.opening import refuse_loss, refuse_other
from passdeploy.reporting import load_report
from passdeploy.reporting.schema import Report
from passdeploy.search.method import get_method
from passdeploy.siblings import link_siblings
from passdeploy.stages import PER_BUDGET, SHARED
from passdeploy.stages.common import slicer
from passdeploy.stages.profile import given_model
from passdeploy.subject import Model, Subject, load_subject
from passdeploy.targets import Target, resolve
from passdeploy.workspace import (
    CONFIG,
    Workspace,
    write_atomic,
)

P = ParamSpec("P")
T = TypeVar("T")


def _alone(method: Callable[Concatenate[Run, P], T]) -> Callable[Concatenate[Run, P], T]:
    """A method of a run that writes: no other process may work in the run directory meanwhile."""

    @functools.wraps(method)
    def call(self: Run, /, *arguments: P.args, **named: P.kwargs) -> T:
        with exclusive(self.space.root):
            return method(self, *arguments, **named)

    return call


@dataclass
class BudgetRun:
    """One budget of a run.

    Attributes:
        index: Among the run's budgets.
        budget: What was asked.
        space: Where its stages lie.
    """

    index: int
    budget: Budget
    space: Workspace


class Run:
    """A run over a run directory.

    Args:
        config: What to do.
        out: The run directory.
        ui: Shows progress.
        model: A factory or a network instead of `config.model`.
        data: A data set instead of `config.data`.
        fresh: Delete what an earlier run left there.
        command: As typed, for the report.
        latency_only: The dense network is neither trained nor evaluated: how long it takes does not depend on it.

    Raises:
        BadInput: The configuration can't be used, or `out` holds a run of another one.
        Unavailable: A part that the target needs is missing here.
    """

    def __init__(
        self,
        config: RunConfig,
        out: Path,
        ui: Ui | None = None,
        *,
        model: Model | None = None,
        data: ImageData | None = None,
        fresh: bool = False,
        command: str | None = None,
        latency_only: bool = False,
    ) -> None:
        self.config, self.ui, self.command, self.latency_only = config, ui or Ui(quiet=True), command, latency_only
        self._model, self._data = model, data
        self.budgets = parse_budgets(list(config.latency), config.percentile, config.scope)
        self.target: Target = resolve(
            config.target,
            backend=config.backend,
            precision=config.precision,
            batch=config.batch,
            threads=config.threads,
        )
        get_method(config.method)
        if config.profile_file is not None and not Path(config.profile_file).is_file():
            raise BadInput(f"--profile {config.profile_file}: no such file; passdeploy profile --save FILE writes one")
        if config.require_measured and not self.measured:
            self.ui.say(
                f"--require-measured: this run will end with exit 1, since nothing can be measured on target "
                f"{self.target.name}: {self.unmeasurable}."
            )
        self.space = Workspace(out)
        with exclusive(out):
            if not fresh:
                refuse_other(config, out)
            # What can't be used is said before anything is deleted, and before a folder is bound to this configuration.
            _ = self.subject
            if config.profile_file is not None and config.axis == "latency":
                given_model(self)
            if fresh:
                refuse_loss(config, out)
                self.space.clear()
            # Again where a key differs that is no input: the stages alone read the configuration from here.
            written = yaml.safe_dump(config.to_json(), sort_keys=False)
            if not (out / CONFIG).exists() or (out / CONFIG).read_text(encoding="utf-8") != written:
                write_atomic(out / CONFIG, written)
        several = len(self.budgets) > 1
        self.runs = [
            BudgetRun(i, budget, Workspace(out / budget.asked) if several else self.space)
            for i, budget in enumerate(self.budgets)
        ]
        self.answers = self.runs

    @property
    def measured(self) -> bool:
        """Whether engines for the target can be timed on this machine."""
        return self.unmeasurable is None

    @property
    def closed(self) -> bool:
        """Whether the closed loop decides: budgets are in latency, and engines can be measured."""
        return self.measured and self.config.axis == "latency"

    @property
    def unmeasurable(self) -> str | None:
        """Why engines for the target can't be timed on this machine; None where they can."""
        return unmeasurable(self.target)

    @property
    def wants_alternatives(self) -> bool:
        """Whether the dense network in lower precisions stands in the report."""
        return self.config.alternatives and self.config.axis == "latency"

    @cached_property
    def subject(self) -> Subject:
        """Network and data."""
        return load_subject(self.config, self._model, self._data)

    @cached_property
    def slicer(self) -> OnnxSlicer:
        """Thin ONNX files of the dense network, for measuring; made once, since each takes two exports."""
        return slicer(self)

    @cached_property
    def validation_images(self) -> np.ndarray:
        """Real images (n, 3, H, W) for proofs and timing."""
        return self.sampled_images(max(64, self.target.batch))

    @property
    def calibration_images(self) -> np.ndarray:
        """Real images (n, 3, H, W) for int8 and fp8; not kept, since large ones take gigabytes."""
        return self.sampled_images(max(CALIBRATION_IMAGES, self.target.batch))

    def sampled_images(self, count: int) -> np.ndarray:
        """Real images (count, 3, H, W) of the whole validation split."""
        split = self.subject.data.val
        images: np.ndarray = split.images(evenly(split, count)).numpy()
        return images

    def target_facts(self) -> dict[str, Any]:
        """The target and the version of its backend."""
        return target_facts(self.target)

    def inputs(self, stage: str, run: BudgetRun | None = None) -> dict[str, Any]:
        """All that the result of a stage depends on, upstream stages by their digests."""
        return inputs_of(self, stage, run)

    @_alone
    def stage(self, name: str, run: BudgetRun | None = None) -> None:
        """Runs one stage; unchanged ones are kept."""
        space = self.space if run is None else run.space
        inputs = self.inputs(name, run)
        if space.current(name, inputs):
            self.ui.skipped(name)
            return
        if said := starts_over(space, name, inputs):
            self.ui.say(said)
        body = partial(SHARED[name], self) if run is None else partial(PER_BUDGET[name], self, run)
        with self.ui.stage(name):
            space.run(name, inputs, body)

    @_alone
    def shared(self, until: str = SHARED_STAGES[-1]) -> None:
        """The stages that all budgets share."""
        if self.subject.weights is None and not self.latency_only and self.space.record("dense") is None:
            self.ui.say(
                f"No weights given: {self.subject.name} is first trained on {self.subject.data.name} "
                f"({self.config.dense_epochs():g} epochs)."
            )
        for name in SHARED_STAGES[: SHARED_STAGES.index(until) + 1]:
            if name != "alternatives" or self.wants_alternatives:
                self.stage(name)

    @_alone
    def budget_stages(self, run: BudgetRun, until: str = "ship") -> None:
        """The stages of one budget; what comes after a failed one is left out, but for the report."""
        for name in BUDGET_STAGES[: BUDGET_STAGES.index(until) + 1]:
            if name in skipped(run):
                continue
            self.stage(name, run)

    @_alone
    def run_until(self, name: str) -> list[BudgetRun]:
        """One stage and those before it, alone; what is then up to date is offered as final copies.

        Returns:
            The budgets that got as far as that; of a search for the fastest one, those that the run looked at.

        Raises:
            PassdeployError: None did: what was found before leaves nothing to do for this stage.
        """
        if name in SHARED_STAGES:
            self.shared(name)
            best = self._best()
            for run in self.runs:  # what came of an earlier state is offered no more
                if run.space.record("fit") is not None:
                    self._publish_until(None, run, best)
            return []
        self.shared()
        fastest = self.config.latency == (FASTEST,)
        asked = [run for run in self.runs if run.space.record("fit") is not None] if fastest else self.runs
        if not asked:
            raise BadInput(f"--out {self.space.root}: no budget was looked at yet; start with passdeploy run")
        best = self._best()
        stopped = {}
        for run in asked:
            self.budget_stages(run, name)
            self._publish_until(name, run, best)
            if name in skipped(run) or (name == "compile" and "bench" in skipped(run)):
                stopped[run.budget.asked] = stopped_by(run)
            elif name == "fit" and "finetune" in skipped(run):
                self.ui.say(f"{run.budget.asked}: {stopped_by(run)}")
        link_siblings(asked, self.space.root if fastest else None)
        if len(stopped) == len(asked):
            reasons = "; ".join(f"{budget}: {reason}" for budget, reason in stopped.items())
            raise PassdeployError(f"{name}: nothing to go on with, since {reasons}")
        for budget, reason in stopped.items():
            self.ui.say(f"{budget}: {name}: nothing to go on with, since {reason}.")
        return [run for run in asked if run.budget.asked not in stopped]

    def _best(self) -> str | None:
        """The budget that is published at the top as well; None where none is, or the only one lies there."""
        published = self.space.root / "report.json"
        fastest = self.config.latency == (FASTEST,)
        return load_report(published).budget.asked if fastest and published.exists() else None

    def _publish_until(self, name: str | None, run: BudgetRun, best: str | None) -> None:
        """Publishes what is up to date after a stage (None: after the shared ones)."""
        self.publish(run, until=name)
        if run.budget.asked == best:
            self.publish(run, self.space.root, until=name)

    def finish(self, run: BudgetRun) -> Report:
        """The stages of one budget, and the final copies."""
        self.budget_stages(run)
        self.publish(run)
        return load_report(run.space.folder("report") / "report.json")

    @_alone
    def run(self) -> list[Report]:
        """Everything; one report for each of `self.answers`."""
        self.shared()
        if self.config.latency == (FASTEST,):
            return [self._fastest()]
        reports = [self.finish(run) for run in self.runs]
        link_siblings(self.runs)
        return reports

    def _fastest(self) -> Report:
        """Bisects for the fastest budget whose network keeps the accuracy; it is published at the top as well."""
        kept, lost = -1, len(self.runs)
        reports: dict[int, Report] = {}
        while lost - kept > 1:
            middle = (kept + lost) // 2
            run = self.runs[middle]
            reports[middle] = self.finish(run)
            status = reports[middle].status
            self.ui.say(f"{run.budget.asked}: {status.replace('_', ' ')}")
            kept, lost = (middle, lost) if reports[middle].goal_met else (kept, middle)
        best = max(kept, 0)  # when none keeps it, the slowest one says by how much
        self.answers = [self.runs[best]]
        self.publish(self.runs[best], self.space.root)
        link_siblings([self.runs[i] for i in sorted(reports)], self.space.root)
        return reports[best]

    @_alone
    def publish(self, run: BudgetRun, root: Path | None = None, until: str | None = BUDGET_STAGES[-1]) -> None:
        """Puts the final copies where the design promises them: into the budget's folder, or into `root`.

        Args:
            run: A budget whose stages up to `until` have just been run, or none of them.
            root: Instead of the budget's own folder.
            until: What later stages left is offered if it is still what they would make.
        """
        copy_final(self, run, root or run.space.root, until)

    def dense_state(self) -> dict[str, torch.Tensor]:
        """Weights of the dense network that the run starts from."""
        return load_file(self.space.folder("dense") / "dense.safetensors")
