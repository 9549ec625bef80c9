"""What the result of a stage depends on, and which stages make no sense after what others found."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import passdeploy
from passdeploy.engines.base import get_backend
from passdeploy.stages import PER_BUDGET, SHARED
from passdeploy.stages.proof import exact
from passdeploy.targets import cpu_stamp
from passdeploy.workspace import json_digest, read_json, sha256

if TYPE_CHECKING:
    from passdeploy.pipeline import BudgetRun, Run
    from passdeploy.targets import Target
    from passdeploy.workspace import Workspace

SHARED_STAGES, BUDGET_STAGES = tuple(SHARED), tuple(PER_BUDGET)
NOT_INPUTS = ("require_measured", "alternatives")
"""Keys that change what is printed, required or shown beside it, not what the run itself computes."""

CHANGED = {
    "passdeploy": "the version of passdeploy",
    "cpu": "the CPU (or whether its memory comes in huge pages)",
    "network": "the network (or the code of its classes)",
    "data": "the data (or the code of a task of your own)",
}
"""Inputs in words, where their key says too little."""


def version() -> str:
    """Of this package."""
    return passdeploy.__version__


def unmeasurable(target: Target) -> str | None:
    """Why engines for a target can't be timed on this machine; None where they can."""
    if not target.attached:
        return f"{target.device} is not attached to this machine"
    return get_backend(target.backend).runnable(target)


def target_facts(target: Target) -> dict[str, Any]:
    """A target and the version of its backend."""
    return {**vars(target), "backend_version": get_backend(target.backend).libraries()}


def measured_by(target: Target) -> dict[str, Any]:
    """What is measured here depends on, besides `target_facts`. On a GPU the host's CPU does not count."""
    stamp = cpu_stamp() if target.compute_capability is None else None  # virtual machines share names
    return {"measured": unmeasurable(target) is None, "cpu": stamp}


def inputs_of(run: Run, stage: str, budget: BudgetRun | None = None) -> dict[str, Any]:
    """All that the result of a stage depends on, upstream stages by their digests.

    Args:
        run: The run.
        stage: Its name.
        budget: For the stages of a budget.
    """
    config, shared = run.config.to_json(), run.space.digest
    common: dict[str, Any] = {"passdeploy": version()}
    # Digests of earlier stages do not tell: a latency model from a file, a score of the weights alone and the weights
    # that were given are the same bytes whatever a forward pass does with them.
    code = {"network": run.subject.architecture}
    here = measured_by(run.target)
    if stage == "dense":
        known = common | {"network": run.subject.digest, "data": run.subject.data_digest}
        if run.latency_only:
            return known | {"latency_only": True}
        if run.subject.weights is None:
            known |= {k: config[k] for k in ("dense", "epochs", "train_batch", "seed")}
        return known
    if stage == "profile":
        profile = None if config["profile_file"] is None else sha256(Path(config["profile_file"]))
        # A latency model from a file is the same wherever the run is continued.
        where = here if profile is None else {}
        return (
            common
            | code
            | where
            | {
                "dense": shared("dense"),
                "target": run.target_facts(),
                "profile": config["profile"],
                "scope": config["scope"],
                "axis": config["axis"],
                "seed": config["seed"],
                "file": profile,
            }
        )
    if stage == "search":
        keys: tuple[str, ...] = (
            "search", "prompt", "groups", "train_batch", "seed", "method", "latency", "percentile"
        )  # fmt: skip
        made = {"profile": shared("profile"), "dense": shared("dense"), "data": run.subject.data_digest}
        decay = {"weight_decay": config["finetune"]["weight_decay"]}  # the search trains the same weights
        # What is searched for with a budget in time is held against the dense engine as it is measured here.
        timed = run.closed and any(each.latency_ms is not None for each in run.budgets)
        where = here | {"target": run.target_facts()} if timed else {}
        return common | code | made | decay | where | {k: config[k] for k in keys}
    if stage == "alternatives":
        return (
            common
            | code
            | here
            | {
                "dense": shared("dense"),
                "data": run.subject.data_digest,
                "target": run.target_facts(),
                "scope": config["scope"],
                "percentile": config["percentile"],
            }
        )
    assert budget is not None
    digest = budget.space.digest
    beside = {"alternatives": shared("alternatives")} if run.wants_alternatives else {}
    asked = {"budget": vars(budget.budget)}
    if stage == "fit":
        where = {"target": run.target_facts(), "scope": config["scope"]}
        return common | code | asked | here | where | {"search": shared("search"), "profile": shared("profile")}
    if stage == "finetune":
        keys = ("finetune", "epochs", "train_batch", "seed")
        # What fit found says nothing of the weights that training goes on from.
        made = {"fit": digest("fit"), "search": shared("search"), "dense": shared("dense")}
        return common | code | made | {"data": run.subject.data_digest, **{k: config[k] for k in keys}}
    if stage == "compile":
        made = {"finetune": digest("finetune"), "data": run.subject.data_digest}  # images calibrate, judge and prove
        floor = {"min_accuracy": config["min_accuracy"]}
        return common | code | floor | here | made | {"target": run.target_facts()}
    if stage == "bench":
        # Not the alternatives: who asks for them later keeps what the budget was judged on, and gets the times
        # that they were given beside the dense engine alone.
        return common | asked | here | {"compile": digest("compile"), "scope": config["scope"]}
    before, left_out = BUDGET_STAGES[: BUDGET_STAGES.index(stage)], skipped(budget)
    upstream = {name: digest(name) for name in before if name not in left_out}
    computed = json_digest({key: value for key, value in config.items() if key not in NOT_INPUTS})
    upstream |= {name: shared(name) for name in ("dense", "profile", "search")}
    # Names of classes, numbers of images and what can't be pruned stand in a report and in a bundle.
    told = code | {"data": run.subject.data_digest}
    told |= {"licence": run.subject.data.licence} if stage == "ship" else {}
    return common | asked | upstream | beside | told | {"config": computed}


def starts_over(space: Workspace, stage: str, inputs: dict[str, Any]) -> str | None:
    """What to say of a stage that was begun, perhaps hours ago, and can't go on since its inputs changed."""
    changed = ", ".join(CHANGED.get(key, key) for key in space.changed(stage, inputs))
    if not changed:
        return None
    kept = "; it goes on from what it had when that is undone and the same command is given again"
    return f"{stage}: starts over, since {changed} changed since it was begun{kept if space.keeps(stage) else ''}"


def skipped(budget: BudgetRun) -> tuple[str, ...]:
    """Stages that make no sense after what the finished ones found."""
    if budget.space.record("fit") is None:
        return ()
    fit = read_json(budget.space.folder("fit") / "fit.json")
    if fit["status"] == "infeasible" or not exact(fit["masked_vs_thin"]):
        return ("finetune", "compile", "bench", "ship")
    proof = budget.space.folder("compile") / "proof.json"
    if budget.space.record("compile") is not None and not read_json(proof)["ok"]:
        return ("bench", "ship")
    return ()


def stopped_by(budget: BudgetRun) -> str:
    """Why stages of this budget are left out."""
    fit = read_json(budget.space.folder("fit") / "fit.json")
    if fit["status"] == "infeasible":
        return "no structure reaches the budget"
    if not exact(fit["masked_vs_thin"]):
        return "the thin network does not compute what the masked one does"
    return "the compiled engine does not compute what the network does"
