"""Profiling: measures engines of deliberately varied structures on the target and fits the latency model to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from passdeploy.errors import BadInput
from passdeploy.latency.log import MeasurementLog, attempt
from passdeploy.latency.model import FEWEST, STEPS, LatencyModel
from passdeploy.latency.sampler import trust
from passdeploy.structure import Structure

if TYPE_CHECKING:
    from passdeploy.groups import Groups, Operator

PURPOSE = "profile"
GOOD_ENOUGH = 0.01
"""Profiling ends early when cross-validation is this close."""
CHECK_EVERY = 20
MOST_FAILED = 10
"""Structures that may fail to compile or run, or as many as were measured, if those are more."""
ODD = 0.2
"""Share of structures with widths on no grid: no search goes there, but a third of the model's terms is about them."""
REPEATED = 6
"""Structures that are measured a second time at the end, to know how well a measurement repeats."""

__all__ = ["MeasureStructure", "keep_first", "profile", "varied_widths"]
MeasureStructure = Callable[[Structure], Mapping[str, Any]]


def keep_first(groups: Groups, widths: Sequence[int] | np.ndarray) -> Structure:
    """The structure that keeps the first units of every group: which ones are kept does not change the latency."""
    return Structure(
        {
            group.name: tuple(i < int(kept) for i in range(group.units))
            for group, kept in zip(groups.groups, widths, strict=True)
        }
    )


def varied_widths(groups: Groups, seed: int, grid: int = 8, odd: float = ODD) -> Iterator[np.ndarray]:
    """An endless stream of widths vectors: near dense to tiny, mostly on the grid, some with blocks missing.

    Args:
        groups: Of the network.
        seed: Of the stream.
        grid: Most widths are multiples of it.
        odd: Share of those whose widths are on no grid; another tenth is on half of it.

    The first are the smallest network, all widths halved, and the dense widths without any block that can go: the
    corners between which the rest interpolates.
    """
    rng = np.random.default_rng(seed)
    units = np.array([group.units for group in groups.groups])
    depth = np.array([group.kind == "depth" for group in groups.groups])
    each = np.array([group.members[0].per_unit if group.members else 1 for group in groups.groups])

    def on(widths: np.ndarray, step: int) -> np.ndarray:
        steps = np.minimum(np.maximum(step // each, 1), units)
        rounded: np.ndarray = np.clip(np.round(widths / steps) * steps, steps, units).astype(int)
        return rounded

    yield np.where(depth, 0, on(0.0 * units, grid))
    yield np.where(depth, 1, on(0.5 * units, grid))
    if depth.any():
        yield np.where(depth, 0, units)
    while True:
        scale, removed = rng.uniform(0.12, 1.0), rng.choice([0.0, 0.15, 0.4])
        widths = units * np.minimum(scale * rng.lognormal(0, 0.4, len(units)), 1)
        step = int(rng.choice([grid, grid // 2, 1], p=[0.9 - odd, 0.1, odd]))
        yield np.where(depth, rng.random(len(units)) > removed, on(widths, step)).astype(int)


def profile(
    measure_structure: MeasureStructure,
    operators: Sequence[Operator],
    groups: Groups,
    *,
    budget_s: float = 30.0,
    seed: int = 0,
    log: MeasurementLog | None = None,
    target_key: str = "",
    steps: Sequence[int] = STEPS,
    least: int = 36,
    most: int = 240,
    good_enough: float = GOOD_ENOUGH,
    bytes_per_weight: int = 4,
    provenance: Mapping[str, Any] | None = None,
    progress: Callable[[float], None] | None = None,
) -> LatencyModel:
    """Measures varied structures until the time is up or the model is good enough, and fits the latency model.

    Args:
        measure_structure: Compiles a structure and measures it beside the dense engine; returns what a
            `passdeploy.latency.sampler.Sampler` does (``ratio`` and ``dense_ms`` at least).
        operators: Of the network.
        groups: Of the network.
        budget_s: Seconds for measuring, compiles included (the logged ones: a resumed run stops where it would have).
        seed: Of the structures.
        log: Measurements are replayed from it and appended to it.
        target_key: Of the target, for the log.
        steps: Width steps among which the fit chooses.
        least: Structures to measure even when the time is up (a third of them when it is up twice over).
        most: Structures at most.
        good_enough: Ends early when the cross-validated mean error is at most this.
        bytes_per_weight: By precision.
        provenance: Recorded in the profile.
        progress: Called with the fraction that is done.

    Raises:
        BadInput: The network has nothing to predict from, or most structures can't be measured.
    """
    if not operators:
        raise BadInput("latency model: the network has no convolution or linear layer to predict from")
    log = log or MeasurementLog()
    units = [group.units for group in groups.groups]
    dense = np.array(units, dtype=float)
    measured: list[tuple[Structure, np.ndarray, Mapping[str, Any]]] = []
    failed: list[str] = []
    seen: set[str] = {groups.dense().digest()}
    seconds = 0.0

    def take(structure: Structure, measure: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        nonlocal seconds
        record = log.measure(PURPOSE, structure.digest(), target_key, measure)
        seconds += record.seconds
        return record.value

    def fit(repeatability: float | None = None) -> LatencyModel:
        # The dense engine's ratio to itself is known without measuring it.
        widths = np.stack([dense, *(w for _, w, _ in measured)])
        ratios = np.array([1.0, *(value["ratio"] for _, _, value in measured)])
        dense_ms = float(np.median([value["dense_ms"] for _, _, value in measured]))
        weights = np.array([1.0, *trust([value.get("dense_floor_ms", 1.0) for _, _, value in measured])])
        facts = {**(provenance or {}), "seed": seed, "seconds": round(seconds, 3), "failed": len(failed)}
        return LatencyModel.fit(operators, units, widths, ratios, dense_ms, steps=steps, provenance=facts,
        weights=weights, fewest=fewest,
                                repeatability=repeatability, bytes_per_weight=bytes_per_weight)  # fmt: skip

    repeats_s, tries, fewest = 0.0, 0, FEWEST
    for widths in varied_widths(groups, seed):
        tries += 1
        structure = keep_first(groups, widths)
        if structure.digest() in seen:
            if tries > 20 * most:  # a network of very few structures, all of which are measured
                fewest = min(FEWEST, len(measured) + 1)
                break
            continue
        seen.add(structure.digest())
        before = seconds
        value = take(structure, partial(attempt, partial(measure_structure, structure)))
        if "failed" in value:
            failed.append(value["failed"])
            if len(failed) > max(MOST_FAILED, len(measured)):
                break
        else:
            measured.append((structure, widths.astype(float), value))
            if len(measured) <= REPEATED:
                repeats_s += seconds - before
        if progress is not None:
            progress(min(max(seconds / budget_s, len(measured) / most), 1.0))
        late = seconds + repeats_s > budget_s
        if (late and len(measured) >= least) or (seconds > 2 * budget_s and len(measured) >= max(least // 3, 10)):
            break
        if len(measured) >= most:
            break
        if "failed" not in value and len(measured) % CHECK_EVERY == 0 and len(measured) >= 2 * CHECK_EVERY:
            model = fit()
            if model.mape is not None and model.mape <= good_enough:
                break
    if failed and (not measured or len(failed) > max(MOST_FAILED, len(measured))):
        raise BadInput(
            f"latency model: {len(failed)} of {len(failed) + len(measured)} structures cannot be measured "
            f"({failed[-1]}); to try them again, remove {log.path or 'the log'}"
        )
    differences = []
    for structure, _, value in measured[:REPEATED]:
        again = take(structure, partial(attempt, partial(measure_structure, structure)))
        if "failed" not in again:
            differences.append(abs(again["ratio"] / value["ratio"] - 1))
    return fit(float(np.mean(differences)) if differences else None)
