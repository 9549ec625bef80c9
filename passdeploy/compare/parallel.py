"""A comparison's runs side by side, a GPU each.

On a CPU there is no such thing: whatever trains beside a measurement is in its latencies.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

from passdeploy.compare.rows import RowFile
from passdeploy.compare.runner import (
    Arm,
    Outcome,
    Plan,
    collected,
    missing,
    refuse_no_test,
    run_label,
    run_plan,
    share,
)
from passdeploy.config import make_config
from passdeploy.console import Ui
from passdeploy.errors import BadInput
from passdeploy.pipeline import Run
from passdeploy.targets import Target, attached_gpus

WORKER = (sys.executable, "-m", "passdeploy.compare.parallel")


def undisturbed(target: Target) -> bool:
    """Whether a run's measurements are left alone by what runs beside it: a GPU each, but the CPU is everybody's."""
    return target.compute_capability is not None


def chosen_gpus(text: str) -> tuple[str, ...]:
    """``0,1`` or ``all``, as this process counts them -> what ``CUDA_VISIBLE_DEVICES`` calls each.

    Raises:
        BadInput: Not numbers of GPUs that are here, each once, all of one kind, which is the first GPU's: this process
            takes the target's name and settings from that one.
    """
    names = attached_gpus()
    here = len(names)
    asked = [str(number) for number in range(here)] if text.strip() == "all" else [p.strip() for p in text.split(",")]
    if not here:
        raise BadInput(f"--gpus {text}: no NVIDIA GPU is attached here; leave it out")
    if not all(part.isdecimal() and int(part) < here for part in asked) or len(set(asked)) != len(asked):
        raise BadInput(f"--gpus {text}: give different numbers from 0 to {here - 1}, separated by commas, or all")
    kinds = {names[int(part)] for part in asked}
    if len(kinds) > 1:
        raise BadInput(f"--gpus {text}: latencies on {' and '.join(sorted(kinds))} can't be compared; give GPUs of one "
                       "kind")  # fmt: skip
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    chosen = tuple(visible[int(part)] if visible else part for part in asked)
    if names[0] not in kinds:
        raise BadInput(
            f"--gpus {text}: the target is the first GPU here, which is another kind ({names[0]}, not {kinds.pop()}); "
            f"start with CUDA_VISIBLE_DEVICES={','.join(chosen)} and --gpus all"
        )
    return chosen


def run_on_gpus(plan: Plan, gpus: Sequence[str], ui: Ui | None = None) -> Outcome:
    """As `run_plan`, as many runs at a time as there are GPUs, each in a process that sees one.

    What all runs of a seed share is made first, one after the other, on the first GPU; where that fails, so do they.

    Args:
        plan: Its network and data by name.
        gpus: As ``CUDA_VISIBLE_DEVICES`` calls them.
        ui: Shows progress.

    Raises:
        BadInput: As `run_plan`; the plan holds a network or data as an object, or its target is a CPU.
    """
    ui = ui or Ui(quiet=True)
    if plan.model is not None or plan.data is not None:
        raise BadInput("--gpus: a network or data given as an object stay in one process; give them by name")
    if not undisturbed(plan.target):
        raise BadInput(f"--gpus with --target {plan.target.name}: what trains beside a measurement on a CPU is in its "
                       "latencies; leave --gpus out, or give a GPU as --target")  # fmt: skip
    todo = missing(plan)
    refuse_no_test(plan)
    free: queue.Queue[str] = queue.Queue()
    for gpu in gpus:
        free.put(gpu)
    failed: dict[str, str] = {}
    ended, children = Event(), set[subprocess.Popen[str]]()

    def process(gpu: str, job: dict[str, Any], label: str) -> dict[str, str]:
        child = subprocess.Popen(
            WORKER,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": gpu},
        )
        children.add(child)
        said, wrong = child.communicate(json.dumps(job))
        children.discard(child)
        if child.returncode != 0:
            lines = wrong.strip().splitlines() or ["no message"]
            return {label: f"its process ended with {child.returncode}: {lines[-1]}"}
        found: dict[str, str] = json.loads(said.splitlines()[-1])
        return found

    def shared(seed: int) -> bool:
        label = f"what the runs of seed {seed} share"
        ui.say(f"{label}: on GPU {gpus[0]}")
        arms = [arm for arm, other in todo if other == seed]
        for reason in process(gpus[0], _job(plan, arms[0], seed) | {"only_share": True}, label).values():
            ui.say(f"{label} failed: {reason}")
            failed.update({run_label(arm, seed): f"{label}: {reason}" for arm in arms})
            return False
        return True

    def work(arm: Arm, seed: int) -> None:
        gpu, label = free.get(), run_label(arm, seed)
        try:
            if ended.is_set():
                return
            ui.say(f"{label}: on GPU {gpu}")
            failed.update(process(gpu, _job(plan, arm, seed), label))
            ui.say(f"{label} failed: {failed[label]}" if label in failed else f"{label}: done")
        finally:
            free.put(gpu)

    with ThreadPoolExecutor(len(gpus)) as pool:
        try:
            ready = {seed for seed in sorted({seed for _, seed in todo}) if shared(seed)}
            for future in [pool.submit(work, arm, seed) for arm, seed in todo if seed in ready]:
                future.result()
        except BaseException:  # Ctrl-C, too: nothing is left behind that works on
            ended.set()
            for child in list(children):
                child.terminate()
            raise
    return Outcome(collected(plan), failed)


def _job(plan: Plan, arm: Arm, seed: int) -> dict[str, Any]:
    return {
        "config": plan.config.to_json(),
        "arm": vars(arm),
        "seed": seed,
        "out": str(plan.out),
        "rows": str(plan.rows.path),
        "split": plan.split,
        "only_share": False,
    }


def work_off(job: dict[str, Any]) -> dict[str, str]:
    """One run of a comparison, or what all of its seed share, in this process; what failed, with the reason."""
    arm = Arm(**job["arm"] | {"latency": job["arm"]["latency"] and tuple(job["arm"]["latency"])})
    plan = Plan(
        make_config(job["config"]),
        (arm,),
        (job["seed"],),
        Path(job["out"]),
        RowFile(Path(job["rows"])),
        split=job["split"],
    )
    if job["only_share"]:
        share(Run(plan.arm_config(arm, job["seed"]), plan.folder(arm, job["seed"])), plan.out / "shared")
        return {}
    return run_plan(plan).failed


def main() -> None:
    """Reads a job from standard input."""
    from passdeploy.errors import PassdeployError

    try:
        failed = work_off(json.load(sys.stdin))
    except PassdeployError as error:
        raise SystemExit(str(error)) from None
    print(json.dumps(failed))


if __name__ == "__main__":
    main()
