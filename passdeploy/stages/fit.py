"""The closed loop: allocates, measures and repeats until the engine is just inside the budget; proves the masks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from passdeploy.errors import BadInput
from passdeploy.groups import Masker, as_masks
from passdeploy.latency.candidates import excess, meets
from passdeploy.latency.log import MeasurementLog
from passdeploy.latency.loop import close_gap, close_loop
from passdeploy.reporting.format import milliseconds
from passdeploy.search.allocator import ALLOCATORS, width_grids
from passdeploy.search.latency_allocator import LatencyAllocator
from passdeploy.search.method import SearchResult
from passdeploy.search.prompt import InputStage, Prompted
from passdeploy.stages.common import input_stage, kept_widths, meter, time_structure
from passdeploy.stages.profile import stage_model
from passdeploy.stages.proof import recorded_difference
from passdeploy.structure import Structure
from passdeploy.surgery import thin
from passdeploy.training import fitting_batch
from passdeploy.workspace import write_json

if TYPE_CHECKING:
    from passdeploy.pipeline import BudgetRun, Run

MARGIN = 1.02
"""The loop accepts what is this much inside the budget, so that the engine that ships is inside it too."""
DENSE_TIMINGS = 3
"""How often the dense engine is measured against a budget in time: it is shipped as it is only by the one in the
middle, and with the margin that any other structure has to keep."""
MOST_FITS = 12
"""Structures that the closed loop measures at most."""
MOST_GAP_FITS = 6
"""As many again, at most, to find one between what is far too fast and what is too slow."""
FAR = 0.8
"""What trials decided is kept to down to this share of the latency that is first asked for: an engine may be so much
slower than predicted that its blocks would be squeezed to their least widths."""

Allocated = tuple[Structure, float]


@dataclass(frozen=True)
class _Timed:
    """A logged comparison of a structure with the dense engine, as the loop reads it."""

    speedup: float
    low: float
    thin_ms: float | None
    dense_ms: float | None
    pace_ms: float | None = None


UNMEASURED = _Timed(0.0, 0.0, None, None)
"""Of a structure that does not compile or run."""


def _fit_measured(
    run: Run,
    budget: BudgetRun,
    folder: Path,
    facts: dict[str, Any],
    allocate: Callable[[float], Allocated | None],
    fastest: Callable[[], Allocated],
    narrow: Callable[[Structure, float], Allocated | None],
    dense_ms: float,
    stage: InputStage,
    left_whole: bool,
) -> tuple[Structure, str, dict[str, Any]]:
    """The closed loop on measured engines: the structure, the status, and what it reaches."""
    asked, groups = budget.budget, run.subject.groups
    log = MeasurementLog(folder / "measurements.jsonl")
    with meter(run, stage) as timed:

        def measure(structure: Structure) -> _Timed:
            digest = structure.digest()
            ran = any(record.digest == digest and "failed" not in record.value for record in log.records)
            take = partial(time_structure, timed, structure, asked, ran_before=ran)
            value = log.measure("fit", digest, run.target.name, take).value
            failed = "failed" in value
            tried = len({record.digest for record in log.records})
            run.ui.step(tried, max(MOST_FITS, tried), "not measurable" if failed else f"{value['speedup']:.3f}x")
            return UNMEASURED if failed else _Timed(**value)

        if asked.speedup == 1:
            return groups.dense(), "dense_inside", {"latency_ms": dense_ms, "speedup": 1.0, "measured": True}
        model_ms = dense_ms  # of the dense engine, by the model; a time budget is asked of the model in its own unit
        if asked.latency_ms is not None:
            # In time, only a measurement tells whether there is anything to do, and how far away the budget is.
            timings = [measure(groups.dense()) for _ in range(DENSE_TIMINGS)]
            dense = sorted(timings, key=lambda timing: timing.thin_ms or 0.0)[DENSE_TIMINGS // 2]
            dense_ms = dense.dense_ms or dense_ms
            facts["dense_ms"], facts["pace_ms"] = dense.dense_ms, dense.pace_ms
            if meets(asked, dense, MARGIN):
                return groups.dense(), "dense_inside", {"latency_ms": dense_ms, "speedup": 1.0, "measured": True}
            if left_whole:
                raise BadInput(
                    f"fit: the dense engine takes {milliseconds(dense_ms)} at {asked.percentile}, and the search found "
                    f"it inside {asked.asked} and left it whole; remove {run.space.folder('search')} and run again"
                )
        scale = model_ms / dense_ms
        found = close_loop(allocate, fastest, measure, asked, model_ms, MOST_FITS, MARGIN, scale)
        found = close_gap(found, narrow, measure, asked, model_ms, MOST_GAP_FITS, MARGIN, scale)
    chosen = found.chosen
    assert isinstance(chosen.timing, _Timed)
    facts["dense_ms"], facts["pace_ms"] = chosen.timing.dense_ms, chosen.timing.pace_ms
    facts["unsteady"] = not found.feasible and excess(asked, chosen.timing) >= 1
    failed = list(dict.fromkeys(record.value["failed"] for record in log.records if "failed" in record.value))
    if chosen.failed:
        raise BadInput(f"fit: no structure can be measured ({failed[-1]}); to try them again, remove {log.path}")
    if failed:
        facts["left_out"] = True
        where = budget.space.folder("fit").relative_to(run.space.root).as_posix()
        facts["messages"].append(
            f"Structures were left out that can't be measured: {'; '.join(failed)} (to try them again, remove "
            f"{where}/measurements.jsonl in the run directory and run again)"
        )
    facts["candidates"] = [
        {
            "asked_ms": candidate.asked_ms,
            "predicted_ratio": candidate.predicted_ms / model_ms,
            "measured_ratio": None if candidate.failed else 1 / candidate.timing.speedup,
            "chosen": candidate is chosen,
        }
        for candidate in found.candidates
    ]
    if found.plateau:
        facts["messages"].append(
            "Latency is a staircase: no structure was found between the chosen one and the budget, "
            "so it is faster than asked."
        )
    reached = {"latency_ms": chosen.timing.thin_ms, "speedup": chosen.timing.speedup, "measured": True}
    return chosen.structure, "within_budget" if found.feasible else "infeasible", reached


def run_fit(run: Run, budget: BudgetRun, folder: Path) -> None:
    """Re-allocates from the same scores until the measured engine is just inside the budget, and proves the masks."""
    result = SearchResult.load(run.space.folder("search"))
    predictor = stage_model(run)
    groups, asked = run.subject.groups, budget.budget
    grids = width_grids(groups, predictor.step, run.config.search.keep_at_least, result.depth)
    allocator = ALLOCATORS[result.allocator](groups, predictor, grids)
    held = allocator.holding(result.blocks_of(budget.index))
    between = LatencyAllocator(groups, predictor, grids)  # fills gaps for every method, whatever its own rule
    importance = result.importance_arrays(budget.index)
    facts: dict[str, Any] = {"messages": [], "candidates": [], "reachable": None, "masked_vs_thin": None}
    facts["left_out"] = facts["unsteady"] = False
    facts["dense_ms"] = facts["pace_ms"] = None  # beside the chosen one (or alone), where that was measured
    dense_ms = predictor.dense_ms
    stage = input_stage(run, result.stage)

    targets: list[float] = []

    def allocate(target_ms: float) -> tuple[Structure, float] | None:
        targets.append(target_ms)  # the first is about what trials were held for
        found = held.solve(importance, target_ms) if target_ms > FAR * targets[0] else None
        found = found or allocator.solve(importance, target_ms)
        return None if found is None else (found.structure, found.predicted_ms)

    def fastest() -> tuple[Structure, float]:
        widths = allocator.fastest()
        return allocator.structure(importance, widths), float(allocator.predict(widths[None])[0])

    def narrow(slower: Structure, target_ms: float) -> tuple[Structure, float] | None:
        found = between.narrow(importance, target_ms, kept_widths(run, slower))
        return None if found is None else (found.structure, found.predicted_ms)

    if run.closed:
        structure, status, reached = _fit_measured(
            run, budget, folder, facts, allocate, fastest, narrow, dense_ms, stage, result.left_whole(budget.index)
        )
    elif asked.target_ratio(dense_ms) >= 1:
        structure, status = groups.dense(), "dense_inside"
        reached = {"latency_ms": dense_ms, "speedup": 1.0, "measured": False}
    else:
        allocated = allocate(asked.target_ms(dense_ms))
        status = "within_budget" if allocated is not None else "infeasible"
        structure, predicted = allocated or fastest()
        reached = {"latency_ms": predicted, "speedup": dense_ms / predicted, "measured": False}
    if status == "infeasible":
        how = "measured" if run.closed else "predicted"
        unit = "ms" if run.config.axis == "latency" else "MACs"
        facts["reachable"] = reached
        that = "that can be measured " if facts["left_out"] else ""
        # Of a speed-up, the percentile of the time may be unknown: too few samples.
        amount = "" if reached["latency_ms"] is None else f"{reached['latency_ms']:.4g} {unit}, "
        but = ", but not steadily enough to count on it" if facts["unsteady"] else ""
        facts["messages"].append(
            f"No structure reaches {asked.asked}: the fastest {that}is {how} at {amount}{reached['speedup']:.2f}x{but}."
        )
    if status == "dense_inside":
        how = "is already" if run.closed or asked.speedup == 1 else "is predicted to be"
        facts["messages"].append(f"The dense engine {how} inside the budget of {asked.asked}: it is shipped as it is.")
        fixed = [g.name for g in run.subject.groups.groups if g.fixed is not None and g.fixed != g.units]
        if fixed:
            facts["messages"].append(f"Widths that were fixed ({', '.join(fixed)}) are those of pruned networks only.")
    state = run.subject.with_state(result.network)
    facts["masked_vs_thin"] = prove_masked(run, Prompted(stage, state), structure)
    write_json(folder / "structure.json", groups.canonical(structure).to_json())
    write_json(folder / "fit.json", facts | {"status": status})


@torch.no_grad()
def prove_masked(run: Run, model: Prompted, structure: Structure) -> float:
    """Relative difference between the masked network and the thin one, on real images, in eval mode."""
    images = torch.from_numpy(run.validation_images)
    model = model.cpu().float().eval()
    groups = run.subject.groups
    masker, masks = Masker(model, groups, "network."), as_masks(groups.canonical(structure).masks)
    small = Prompted(model.stage, thin(model.network, groups, structure).eval())
    parts = images.split(fitting_batch(run.subject.data.val, len(images)))  # activations of all at once may not fit
    return recorded_difference(torch.cat([masker(masks, part) for part in parts]), torch.cat([*map(small, parts)]))
