"""Runs every method with every seed through the pipeline; all of them share the dense network and the latency model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from passdeploy.compare.rows import SPLITS, Row, RowFile
from passdeploy.config import RunConfig, SearchConfig, make_config, merge
from passdeploy.console import Ui
from passdeploy.data.base import ImageData
from passdeploy.dependencies import measured_by, target_facts, version
from passdeploy.errors import BadInput, NotWritten, PassdeployError
from passdeploy.judging import judge
from passdeploy.opening import free_folder
from passdeploy.pipeline import BudgetRun, Run
from passdeploy.search.method import get_method, trains
from passdeploy.subject import Model, Subject, load_subject
from passdeploy.targets import Target, resolve
from passdeploy.workspace import RECORD, Workspace, json_digest, link_folder, read_json, sha256

SHARED = ("dense", "profile")
OWN = ("method", "seed", "require_measured", "alternatives")


@dataclass(frozen=True)
class Arm:
    """What is compared: a method, or a variant of one.

    Attributes:
        name: In rows and folders.
        method: As ``--method`` takes it.
        settings: Of the configuration, on top of what all share.
        latency: Budgets of its own; None: all.
    """

    name: str
    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    latency: tuple[str, ...] | None = None

    @property
    def title(self) -> str:
        """Its name, and its own budgets: arms that differ in nothing else share a name."""
        return self.name if self.latency is None else f"{self.name} {','.join(self.latency)}"

    @property
    def folder(self) -> str:
        """Of its runs."""
        return self.title.replace(" ", "-")


@dataclass
class Plan:
    """A comparison.

    Attributes:
        config: What all arms share; its method and seed do not count.
        arms: What is compared.
        seeds: Each arm runs once with each.
        out: Runs lie in ``out/<arm>/<seed>``; where one of other settings does, beside it.
        rows: Where results are appended; a run whose rows are all there is not run again.
        model: A factory or a network instead of the configuration's.
        data: A data set instead of the configuration's.
        split: Whose accuracies are wanted: data that has none there are refused at once. None: what there is.
    """

    config: RunConfig
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    out: Path
    rows: RowFile
    model: Model | None = None
    data: ImageData | None = None
    split: str | None = None

    @cached_property
    def subject(self) -> Subject:
        """What all arms start from."""
        return load_subject(self.config, self.model, self.data)

    @cached_property
    def inputs(self) -> str:
        """Digest of what names and paths in the settings stand for, and of what measures: rows of others are old."""
        profile = self.config.profile_file
        facts = {
            "network": self.subject.digest,
            "data": self.subject.data_digest,
            "profile": None if profile is None else sha256(Path(profile)),
            "passdeploy": version(),
            "target": target_facts(self.target),
            **measured_by(self.target),
        }
        return json_digest(facts)[:12]

    @cached_property
    def target(self) -> Target:
        """That the arms are measured on."""
        c = self.config
        return resolve(c.target, backend=c.backend, precision=c.precision, batch=c.batch, threads=c.threads)

    def settings(self) -> str:
        """Digest of what all arms share."""
        shared = {key: value for key, value in self.config.to_json().items() if key not in OWN}
        search = {key: value for key, value in shared["search"].items() if key not in SearchConfig.TRAINING}
        return json_digest({**shared, "search": search})[:12]

    def own(self, arm: Arm) -> str:
        """Digest of what an arm has besides."""
        search = self.config.to_json()["search"]
        training = {key: search[key] for key in SearchConfig.TRAINING} if trains(arm.method) else {}
        return json_digest({"method": arm.method, "settings": arm.settings, "training": training})[:12]

    def arm_config(self, arm: Arm, seed: int) -> RunConfig:
        """The configuration of one run."""
        own: dict[str, Any] = {"method": arm.method, "seed": seed, "alternatives": False}
        if arm.latency is not None:
            own["latency"] = list(arm.latency)
        return make_config(merge(merge(self.config.to_json(), arm.settings), own), f"arm {arm.name}")

    def folder(self, arm: Arm, seed: int) -> Path:
        """Where one run lies."""
        return free_folder(self.arm_config(arm, seed), self.out / arm.folder / str(seed))


def arms_of(names: Sequence[str]) -> tuple[Arm, ...]:
    """One arm per method.

    Raises:
        BadInput: A method is not known, or named twice.
    """
    for name in names:
        get_method(name)
    if not names or len(set(names)) != len(names):
        raise BadInput(f"--methods {','.join(names)}: name each method once, separated by commas")
    return tuple(Arm(name, name) for name in names)


def run_label(arm: Arm, seed: int) -> str:
    """What a run is called."""
    return f"{arm.title}, seed {seed}"


def share(run: Run, pool: Path) -> None:
    """Takes the dense network and the latency model from the pool, or computes them and puts them there."""
    for stage in SHARED:
        kept = pool / f"{stage}-{json_digest(run.inputs(stage))[:16]}"
        if not run.space.current(stage, run.inputs(stage)) and (kept / RECORD).exists():
            link_folder(kept, run.space.folder(stage))
        run.shared(stage)
        if not kept.exists():
            pool.mkdir(parents=True, exist_ok=True)
            link_folder(run.space.folder(stage), kept)


def finish(run: Run, budget: BudgetRun) -> None:
    """The stages of a budget up to the measurement, and a report where the budget is a latency."""
    run.budget_stages(budget, "report" if run.config.axis == "latency" else "bench")


def _status(run: Run, budget: BudgetRun, fit: dict[str, Any], bench: dict[str, Any] | None) -> str:
    if run.config.axis == "latency":
        status: str = read_json(budget.space.folder("report") / "report.json")["status"]
        return status
    if fit["status"] == "infeasible":
        return "infeasible"
    proof = budget.space.folder("compile") / "proof.json"
    if not proof.exists() or not read_json(proof)["ok"]:
        return "not_equivalent"
    return "within_budget" if bench is not None else "unverified"


def _accuracies(
    run: Run, space: Workspace, split: str, dense: dict[str, Any], tuned: dict[str, Any] | None
) -> tuple[float | None, float | None, dict[str, str]]:
    """Of the dense and of the thin network, and, in a lower precision, what they are of.

    Beside an engine's speed-up stands the engine's own accuracy, which is known on the test split.
    """
    whole, thin = dense["accuracy"][split], tuned["accuracy"][split] if tuned else None
    precision, file = run.target.precision, space.folder("compile") / "accuracy.json"
    if precision == "fp32":
        return whole, thin, {}
    lower = read_json(file) if tuned and space.record("compile") is not None else None
    if split != "test" or lower is None:
        return whole, thin, {"precision": precision, "accuracy_of": "network"}
    return lower["dense"], lower["model"], {"precision": precision, "accuracy_of": lower["of"]}


def rows_of(run: Run, budget: BudgetRun, plan: Plan, arm: Arm) -> list[Row]:
    """Rows of a finished budget, one per split that has images."""
    shared, space = run.space, budget.space
    dense = read_json(shared.folder("dense") / "dense.json")
    fit = read_json(space.folder("fit") / "fit.json")
    tuned, bench = None, None
    if space.record("finetune") is not None and fit["status"] != "infeasible":
        tuned = read_json(space.folder("finetune") / "finetune.json")
    if space.record("bench") is not None and tuned is not None:
        bench = read_json(space.folder("bench") / "bench.json")
    measured = bench if bench is not None and bench["measured"] else None
    ratio = measured["ratio"] if measured else None
    seconds = {name: shared.seconds(name) for name in ("profile", "search")}
    seconds |= {name: space.seconds(name) for name in ("fit", "finetune", "compile", "bench")}
    extra: dict[str, Any] = {"judged": judge(budget.budget, measured)} if measured and run.config.axis == "macs" else {}
    if run.subject.task.name != "classification":
        extra["metric"] = run.subject.task.metric_name
    curves = read_json(shared.folder("search") / "search.json")["curves"]
    searched = curves["step"][-1] if curves.get("step") else 0
    known = ratio is not None and ratio["low"] is not None and ratio["high"] is not None
    return [
        Row(
            method=arm.name,
            data=run.subject.data.name,
            model=run.subject.name,
            budget=budget.budget.asked,
            axis=run.config.axis,
            seed=run.config.seed,
            split=split,
            status=_status(run, budget, fit, measured),
            accuracy=thin_accuracy,
            dense_accuracy=dense_accuracy,
            ratio=ratio["value"] if ratio else None,
            ratio_ci95=(ratio["low"], ratio["high"]) if ratio and known else None,
            macs=tuned["macs"] if tuned else None,
            dense_macs=dense["macs"],
            params=tuned["params"] if tuned else None,
            seconds=seconds,
            steps=searched + tuned["curve"]["step"][-1] if tuned and tuned["curve"] else None,
            settings=plan.settings(),
            inputs=plan.inputs,
            own=plan.own(arm),
            device=run.target.device,
            extra=extra | of,
        )
        for split in SPLITS
        for dense_accuracy, thin_accuracy, of in [_accuracies(run, space, split, dense, tuned)]
        if dense_accuracy is not None
    ]


@dataclass
class Outcome:
    """What became of a comparison.

    Attributes:
        rows: All that can be compared: this plan's settings, arms and seeds.
        failed: Runs that could not finish, with the reason.
    """

    rows: list[Row]
    failed: dict[str, str] = field(default_factory=dict)


def missing(plan: Plan) -> list[tuple[Arm, int]]:
    """Runs, an arm and a seed each, whose rows are not all there."""
    there = {(row.method, row.seed, row.budget) for row in _made_alike(plan)}
    return [
        (arm, seed)
        for seed in plan.seeds
        for arm in plan.arms
        if not all((arm.name, seed, asked) in there for asked in plan.arm_config(arm, seed).latency)
    ]


def collected(plan: Plan) -> list[Row]:
    """Rows of the plan's settings, inputs, device, arms and seeds."""
    return [row for row in _made_alike(plan) if row.seed in plan.seeds]


def _made_alike(plan: Plan) -> list[Row]:
    wanted = (plan.settings(), plan.inputs, plan.target.device)
    own = {arm.name: plan.own(arm) for arm in plan.arms}
    alike = [row for row in plan.rows.read() if (row.settings, row.inputs, row.device) == wanted]
    # Rows of a lower precision that do not say what was judged are from when that was never the engine.
    told = [row for row in alike if plan.target.precision == "fp32" or "accuracy_of" in row.extra]
    return [row for row in told if row.own == own.get(row.method)]


def refuse_no_test(plan: Plan) -> None:
    """Raises `BadInput` where accuracies on test images are wanted of data that has none."""
    data = plan.subject.data
    if plan.split == "test" and not len(data.test):
        raise BadInput(f"{data.name} has no test images, whose accuracies are compared: give some, or (passdeploy "
                       "compare) --split validation")  # fmt: skip


def run_plan(plan: Plan, ui: Ui | None = None) -> Outcome:
    """Runs what is not there yet. Killed and started again it goes on where it was.

    Args:
        plan: What to run.
        ui: Shows progress.

    Raises:
        BadInput: The configuration, the network or the data can't be used, or nothing can be written. A run that fails
            (training that diverges, a compiler that gives up) is in the outcome instead, and the others go on.
    """
    ui, data = ui or Ui(quiet=True), plan.subject.data  # loaded once
    failed: dict[str, str] = {}
    wanted, todo = [(arm, seed) for seed in plan.seeds for arm in plan.arms], missing(plan)
    refuse_no_test(plan)
    for number, (arm, seed) in enumerate(wanted, 1):
        label = run_label(arm, seed)
        if (arm, seed) not in todo:
            ui.say(f"[{number}/{len(wanted)}] {label}: in {plan.rows.path.name} already")
            continue
        ui.say(f"[{number}/{len(wanted)}] {label}")
        run = Run(plan.arm_config(arm, seed), plan.folder(arm, seed), ui, model=plan.model, data=data)
        try:
            share(run, plan.out / "shared")
            run.shared()
            for budget in run.runs:
                finish(run, budget)
                plan.rows.append(rows_of(run, budget, plan, arm))
        except NotWritten:
            raise
        except PassdeployError as error:
            failed[label] = str(error)
            ui.say(f"{label} failed: {error}")
        except Exception as error:  # out of memory, code of the user's: the other runs can do without this one
            failed[label] = f"{type(error).__name__}: {error}"
            ui.say(f"{label} failed: {failed[label]}")
            torch.cuda.empty_cache()
    return Outcome(collected(plan), failed)
