"""What a search costs: a search step against a plain training step, interleaved, and a search against fine-tuning.

    python benchmarks/search_cost.py                       resnet20 on the demo's data
    python benchmarks/search_cost.py --model resnet20 --batch 128 --pairs 20

Both loops are the package's own (`search_pass` and `train`), on the same network, data, batch, teacher and optimiser.
They take turns: each turn is a few steps, a pair is one turn of each, and the ratio is the median over the pairs with
its distribution-free interval. The trials at the search's start, whose steps train several thin networks, take turns
with plain training on their own: what they take is counted in plain steps by multiply-adds, and held against that.
Writes benchmarks/results/DEVICE/search-cost.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("KMP_BLOCKTIME", "0")

import torch
from common import device_folder

from passdeploy.config import make_config
from passdeploy.feeding import steps_per_epoch
from passdeploy.latency.roofline import Roofline
from passdeploy.latency.stats import median_ratio
from passdeploy.search.method import SearchContext, search_steps
from passdeploy.search.prompt import InputStage, Prompted
from passdeploy.search.race import LONGEST, Race
from passdeploy.search.state import prepare
from passdeploy.search.trainer import search_pass, train_settings
from passdeploy.search.trials import SETTLED, SHARE
from passdeploy.subject import load_subject
from passdeploy.targets import resolve
from passdeploy.teacher import Teacher
from passdeploy.training import TrainSettings, train, training_device


class Turns:
    """Two loops in two threads, of which only one runs at a time; the clock is read at the ends of a turn."""

    def __init__(self, names: tuple[str, str], steps: int, pairs: int, warm: int) -> None:
        self.names, self.steps, self.turns = names, steps, warm + pairs
        self.condition, self.running = threading.Condition(), 0
        self.seconds: dict[str, list[float]] = {name: [] for name in names}
        self.ended = False
        """Whether a loop is over, by an error too: the other one must not wait for it."""
        self._start = 0.0

    def progress(self, which: int) -> Callable[[int, int, str], None]:
        """Called by a loop after each of its steps; gives way after the last one of a turn."""
        mine, state = self.names[which], {"done": -1}

        def step(done: int, total: int, text: str) -> None:
            if text.startswith("measuring") or len(self.seconds[mine]) >= self.turns:
                return
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # what this turn enqueued is this turn's
            state["done"] += 1
            if state["done"] == 0:  # the first step of all is nobody's: everything is set up in it
                self._give(which)
            elif state["done"] % self.steps == 0:
                self.seconds[mine].append((time.perf_counter() - self._start) / self.steps)
                self._give(which)

        return step

    def _give(self, which: int) -> None:
        with self.condition:
            self.running = 1 - which
            self.condition.notify_all()
            if len(self.seconds[self.names[which]]) < self.turns:
                self.condition.wait_for(lambda: self.running == which or self.ended)
        self._start = time.perf_counter()

    def enter(self, which: int) -> None:
        """Waits for this loop's first turn."""
        with self.condition:
            self.condition.wait_for(lambda: self.running == which or self.ended)

    def end(self) -> None:
        """Called when a loop is over."""
        with self.condition:
            self.ended = True
            self.condition.notify_all()


def interleaved(turns: Turns, searching: Callable[[], object], plain: Callable[[], object]) -> None:
    """Runs both loops, the plain one in a thread of its own."""
    failed: list[BaseException] = []

    def other() -> None:
        try:
            turns.enter(1)
            plain()
        except BaseException as error:
            failed.append(error)
        finally:
            turns.end()

    thread = threading.Thread(target=other, daemon=True)
    thread.start()
    try:
        searching()
    finally:
        turns.end()
    thread.join(timeout=600)
    if failed:
        raise failed[0]


def trials(context: SearchContext, total: int, plain: Callable[[Turns, int], None]) -> dict[str, Any]:
    """What the trials of a search of `total` steps take, in plain steps, over what they are counted as.

    Turns are of 8 of their steps and 8 plain ones. How many entrants there are changes between turns only.
    """
    steps, turns = 8, Turns(("trials", "plain"), 8, 2 * LONGEST // 8, 1)
    search = prepare(context)
    teacher = Teacher(
        Prompted(InputStage(context.data.preprocess), context.network), training_device(), context.data.input_shape
    )
    race = Race(
        context, search, teacher, train_settings(context.config.search, context), context.ratios[0], SHARE * total
    )
    if not race.all:  # too few steps, or no block that could go
        return {"entrants": 0, "steps": 0, "counted_as": 0.0, "ratio": {"value": 1.0}}
    counted, step = [0.0], turns.progress(0)

    def after() -> None:
        if race.steps % steps == 0:
            counted.append(race.spent)
        step(race.steps, 2 * race.half, "")

    def tried() -> None:
        step(0, 0, "")  # all is set up: turns begin with the race's first step
        race.run(after)

    interleaved(turns, tried, lambda: plain(turns, (2 * LONGEST // 8 + 2) * 8))
    taken = [later - earlier for earlier, later in pairwise(counted)]
    pairs = list(zip(turns.seconds["trials"], turns.seconds["plain"], taken, strict=False))[1:]
    ratio = median_ratio([mine / other / (count / steps) for mine, other, count in pairs])
    return {
        "entrants": len(race.all),
        "steps": race.steps,
        "counted_as": round(race.spent, 1),
        "ratio": ratio.to_json(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=8, help="per turn: a whole round of the allocator's schedule")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--warm", type=int, default=2, help="pairs that do not count")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    # Enough steps for all turns; everything else as shipped.
    total = (args.pairs + args.warm + 2) * args.steps + 2
    config = make_config(
        {
            "model": args.model,
            "data": args.data,
            "train_batch": args.batch,
            "search": {"epochs": 1e-6, "min_steps": total, "trials": 1},  # those have turns of their own
        }
    )
    subject = load_subject(config)
    groups, units = subject.groups, list(subject.groups.units.values())
    predictor = Roofline(subject.operators, units, resolve("cpu"))
    turns = Turns(("search", "plain"), args.steps, args.pairs, args.warm)
    context = SearchContext(
        network=subject.network,
        data=subject.data,
        groups=groups,
        operators=subject.operators,
        predictor=predictor,
        step=predictor.step,
        ratios=(0.5,),
        config=config,
        progress=turns.progress(0),
    )
    settings = TrainSettings(
        epochs=1e-6, batch=args.batch, lr=0.05, distill=config.search.distill, seed=1, min_steps=total
    )

    def plain(turns: Turns, steps: int) -> None:
        model = Prompted(InputStage(subject.data.preprocess), subject.build())
        teacher = Prompted(InputStage(subject.data.preprocess), subject.build())
        train(model, subject.data, replace(settings, min_steps=steps), teacher=teacher, progress=turns.progress(1))

    started = time.perf_counter()
    interleaved(turns, lambda: search_pass(context), lambda: plain(turns, total))
    pairs = list(zip(turns.seconds["search"], turns.seconds["plain"], strict=False))[args.warm :]
    ratio = median_ratio([a / b for a, b in pairs])
    default = make_config({"model": args.model, "data": args.data, "train_batch": args.batch})
    search = search_steps(SearchContext(**{**vars(context), "config": default}))
    finetune = max(
        default.finetune.min_steps,
        round(default.finetune_epochs() * steps_per_epoch(subject.data.train, default.train_batch)),
    )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else resolve("cpu").device
    tried = trials(SearchContext(**{**vars(context), "config": default}), search, plain)
    settled = round(SETTLED * search)
    handed_on = max(0, search - math.ceil(tried["counted_as"]) - settled)  # to fine-tuning
    took = tried["counted_as"] * tried["ratio"]["value"] + settled * ratio.value
    found = {
        "device": device,
        "model": args.model,
        "data": subject.data.name,
        "batch": args.batch,
        "threads": torch.get_num_threads(),
        "steps_per_turn": args.steps,
        "step_ratio": ratio.to_json(),
        "search_step_s": sorted(a for a, _ in pairs)[len(pairs) // 2],
        "plain_step_s": sorted(b for _, b in pairs)[len(pairs) // 2],
        "trials": tried,
        "search_steps": {"trials": tried["counted_as"], "under_masks": settled, "left_to_finetuning": handed_on},
        "finetune_steps": finetune + handed_on,
        "search_over_finetune_epoch": took / steps_per_epoch(subject.data.train, default.train_batch),
        "search_over_finetune": took / (finetune + handed_on),
        "note": "masks at a budget of 2x by the roofline; the search's prior is not in the steps",
        "seconds": round(time.perf_counter() - started, 1),
    }
    out = args.out or device_folder() / "search-cost.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
