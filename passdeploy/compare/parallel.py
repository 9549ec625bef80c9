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
from passdeploy.compare.runner import Arm, Outcome, Plan, collected, missing, share
from passdeploy.config import make_config
from passdeploy.console import Ui
from passdeploy.errors import BadInput
from passdeploy.pipeline import Run
from passdeploy.targets import attached_gpus

WORKER = (sys.executable, "-m", "passdeploy.compare.parallel")


def chosen_gpus(text: str) -> tuple[str, ...]:
    """``0,1`` or ``all``, as this process counts them -> what ``CUDA_VISIBLE_DEVICES`` calls each.

    Raises:
        BadInput: Not numbers of GPUs that are here, each once.
    """
    here = len(attached_gpus())
    asked = [str(number) for number in range(here)] if text.strip() == "all" else [p.strip() for p in text.split(",")]
    if not here:
        raise BadInput(f"--gpus {text}: no NVIDIA GPU is attached here; leave it out")
    if not all(part.isdecimal() and int(part) < here for part in asked) or len(set(asked)) != len(asked):
        raise BadInput(f"--gpus {text}: give different numbers from 0 to {here - 1}, separated by commas, or all")
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return tuple(visible[int(part)] if visible else part for part in asked)


def run_on_gpus(plan: Plan, gpus: Sequence[str], ui: Ui | None = None) -> Outcome:
    """As `run_plan`, as many runs at a time as there are GPUs, each in a process that sees one.

    What all runs of a seed share is made first, one after the other, on the first GPU.

    Args:
        plan: Its network and data by name.
        gpus: As ``CUDA_VISIBLE_DEVICES`` calls them; all of one kind, or latencies can't be compared.
        ui: Shows progress.

    Raises:
        BadInput: As `run_plan`, or the plan holds a network or data as an object.
    """
    ui = ui or Ui(quiet=True)
    if plan.model is not None or plan.data is not None:
        raise BadInput("--gpus: a network or data given as an object stay in one process; give them by name")
    todo = missing(plan)
    for seed in sorted({seed for _, seed in todo}):
        arm = next(arm for arm, other in todo if other == seed)
        ui.say(f"what the runs of seed {seed} share")
        share(Run(plan.arm_config(arm, seed), plan.out / arm.folder / str(seed), ui), plan.out / "shared")
    free: queue.Queue[str] = queue.Queue()
    for gpu in gpus:
        free.put(gpu)
    failed: dict[str, str] = {}
    ended, children = Event(), set[subprocess.Popen[str]]()

    def work(arm: Arm, seed: int) -> None:
        gpu, label = free.get(), f"{arm.name}, seed {seed}"
        try:
            if ended.is_set():
                return
            ui.say(f"{label}: on GPU {gpu}")
            child = subprocess.Popen(
                WORKER,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ | {"CUDA_VISIBLE_DEVICES": gpu},
            )
            children.add(child)
            said, wrong = child.communicate(json.dumps(_job(plan, arm, seed)))
            children.discard(child)
            if child.returncode != 0:
                lines = wrong.strip().splitlines() or ["no message"]
                failed[label] = f"its process ended with {child.returncode}: {lines[-1]}"
            else:
                failed.update(json.loads(said.splitlines()[-1]))
            ui.say(f"{label} failed: {failed[label]}" if label in failed else f"{label}: done")
        finally:
            free.put(gpu)

    with ThreadPoolExecutor(len(gpus)) as pool:
        try:
            for future in [pool.submit(work, arm, seed) for arm, seed in todo]:
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
    }


def work_off(job: dict[str, Any]) -> dict[str, str]:
    """One run of a comparison, in this process; what failed, with the reason."""
    from passdeploy.compare.runner import run_plan

    arm = job["arm"]
    if arm["latency"] is not None:
        arm["latency"] = tuple(arm["latency"])
    plan = Plan(
        make_config(job["config"]),
        (Arm(**arm),),
        (job["seed"],),
        Path(job["out"]),
        RowFile(Path(job["rows"])),
        split=job["split"],
    )
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
