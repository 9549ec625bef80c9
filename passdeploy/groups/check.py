"""Tries groups out: with random masks, the masked network and the thin one must compute the same function.

DepGraph treats an operation it does not know as an element-wise one. Where that is wrong, shapes or values disagree
here, and the group is frozen instead of breaking a user's network later.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from passdeploy.groups.depgraph import tensors
from passdeploy.groups.frozen import is_frozen_norm, thawed
from passdeploy.groups.masking import Masker
from passdeploy.groups.types import ChannelGroup, Groups
from passdeploy.structure import Structure

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
_LARGE = 20_000_000  # parameters above which the check stays in float32


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> None:
    """Gives norms random statistics, scales and shifts, and layers random biases: zeros and ones hide mistakes."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor: object, low: float, high: float) -> None:
        if isinstance(tensor, Tensor):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    for module in model.modules():
        frozen = is_frozen_norm(module)
        if frozen or isinstance(module, (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)):
            uniform(module.weight, 0.5, 1.5)
            uniform(getattr(module, "running_mean", None), -0.5, 0.5)
            uniform(getattr(module, "running_var", None), 0.5, 1.5)
        if frozen or isinstance(getattr(module, "bias", None), nn.Parameter):
            uniform(module.bias, -0.5, 0.5)
    for parameter in model.parameters():
        if (
            parameter.numel() and float(parameter.abs().max()) < 1e-3
        ):  # a zero classifier, a layer scale of 1e-6: nothing would show
            spread = parameter[0].numel() if parameter.ndim > 1 else 1
            uniform(parameter, 0.5 / spread**0.5, 1.5 / spread**0.5)


@torch.no_grad()
def calibrate(model: nn.Module, shape: Sequence[int], images: int = 4, rounds: int = 1) -> None:
    """Gives batch norms the statistics of random images: activations keep their size through any depth.

    Else they may grow until a softmax is saturated or one branch drowns another, and a mistake in what is drowned does
    not show. Left in eval mode; a network that can't take several images at once keeps the statistics that it has.

    Args:
        model: Changed in place.
        shape: Of one image, (channels, height, width).
        images: At once.
        rounds: Batches.
    """
    with thawed(model):
        _calibrate(model, shape, images, rounds)


def _calibrate(model: nn.Module, shape: Sequence[int], images: int, rounds: int) -> None:
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    model.eval()
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    statistics = [[buffer.clone() for buffer in norm.buffers()] for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    generator = torch.Generator().manual_seed(1)
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    try:
        for _ in range(rounds):
            model(torch.rand(images, *shape, generator=generator).to(dtype))
    except Exception:  # one value per channel, a fixed batch size
        for norm, kept in zip(norms, statistics, strict=True):
            for buffer, value in zip(norm.buffers(), kept, strict=True):
                buffer.copy_(value)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


def random_structure(groups: Groups, seed: int = 0, keep: float = 0.5, skip: float = 0.3) -> Structure:
    """Keeps each unit with probability `keep` (at least one per group), drops each branch with probability `skip`."""
    rng = random.Random(seed)
    masks: dict[str, tuple[bool, ...]] = {}
    for group in groups.groups:
        if group.kind == "depth":
            masks[group.name] = (rng.random() >= skip,)
            continue
        mask = [rng.random() < keep for _ in range(group.units)]
        mask[rng.randrange(group.units)] = True
        masks[group.name] = tuple(mask)
    return Structure(masks)


def without_one(structure: Structure) -> Structure:
    """Every channel group loses something: what happened to keep all its units (two heads) loses the first."""
    masks = {n: (False, *m[1:]) if all(m) and len(m) > 1 else m for n, m in structure.masks.items()}
    return Structure(masks)


def _complement(groups: Groups, structure: Structure) -> Structure:
    """Drops the units that a structure keeps, but for one where that were all; blocks stay."""
    masks = dict(structure.masks)
    for group in groups.groups:
        if group.kind != "depth":
            others = tuple(not kept for kept in masks[group.name])
            masks[group.name] = others if any(others) else (True, *others[1:])
    return Structure(masks)


def difference(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Largest of max|a - b| / max|a| over pairs of tensors; infinite when shapes differ or a value is not finite."""
    from passdeploy.surgery import relative_difference

    if len(a) != len(b):
        return float("inf")
    return max((relative_difference(x, y) for x, y in zip(a, b, strict=True)), default=0.0)


@torch.no_grad()
def masked_against_thin(model: nn.Module, groups: Groups, structure: Structure, example: Tensor) -> float:
    """Relative difference between the masked and the thin network's outputs; raises what surgery or running raises."""
    from passdeploy.surgery import thin

    dtype = example.dtype
    masks = {name: torch.tensor(mask, dtype=dtype) for name, mask in structure.masks.items()}
    masked = tensors(Masker(model, groups)(masks, example))
    return difference(masked, tensors(thin(model, groups, structure)(example)))


def _fails(model: nn.Module, groups: Groups, structure: Structure, example: Tensor, training: bool = False) -> str:
    """Why a structure can't be had; empty when masked and thin agree, and, if asked, the thin one runs in training."""
    try:
        got = masked_against_thin(model, groups, structure, example)
    except Exception as error:
        return f"the network does not run without it: {first_line(error)}"
    if not got <= _TOLERANCE[example.dtype]:
        return "the network computes something else without it"
    return _fails_in_training(model, groups, structure, example) if training else ""


@torch.no_grad()
def _fails_in_training(model: nn.Module, groups: Groups, structure: Structure, example: Tensor) -> str:
    from passdeploy.surgery import thin

    try:
        with torch.random.fork_rng(devices=()):  # dropout draws
            thin(model, groups, structure).train()(example)
    except Exception as error:
        return f"the network does not run without it in training: {first_line(error)}"
    return ""


def first_line(error: BaseException) -> str:
    """The kind of an error and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


def _alone(groups: Groups, chosen: Sequence[ChannelGroup], structure: Structure) -> Structure:
    """Only the chosen groups as in `structure`, the others whole."""
    names = {group.name for group in chosen}
    dense = groups.dense().masks
    return Structure({name: structure.masks[name] if name in names else dense[name] for name in groups.names})


def drop_what_fails(model: nn.Module, groups: Groups, example: Tensor, training: bool = False) -> Groups:
    """Freezes groups until the rest can be removed: those that can't go alone, then those that can't go together.

    Args:
        model: A float32 CPU copy with random parameters that may be changed: a small one is converted to float64.
        groups: Candidates.
        example: An input.
        training: Whether what is left has to run in training mode, too.
    """
    size = sum(p.numel() for p in model.parameters())
    if size < _LARGE:
        try:
            model, example = model.double(), example.double()
            with torch.no_grad():
                model(example)
        except Exception:
            model, example = model.float(), example.float()
    inputs = _inputs(model, example)
    while groups.groups:
        skips = (1.0, 0.0, 0.3) if size > _LARGE // 4 else (1.0, 0.0, 0.3, 0.0, 0.3, 0.5)
        # a group of few units may keep them all by chance, in all trials: then nothing would have been tried of it
        trials = [without_one(random_structure(groups, seed, 0.5, skip)) for seed, skip in enumerate(skips)]
        trials.append(_complement(groups, trials[1]))  # all units but a few are dropped in one trial or another
        failing = [
            (trial, images)
            for trial, images in zip(trials, itertools.cycle(inputs), strict=False)
            if _fails(model, groups, trial, images, training)
        ]
        if not failing:
            return groups
        fewer = _without_failing(model, groups, *failing[0], training)
        if fewer == groups:  # none is to blame: the network does not compute the same twice
            return Groups((), {**groups.frozen, "channels": "masked and thin networks differ"})
        groups = fewer
    return groups


@torch.no_grad()
def _inputs(model: nn.Module, example: Tensor) -> list[Tensor]:
    """What trials run on: images in [0, 1], and normalised ones, which leave fewer rectified channels at zero.

    Of a channel that is zero whatever comes before it, a trial can't see where it went. The first are three or more:
    two would pass for a pair where a network takes apart what it is given.
    """
    shape = (max(3, len(example) + 1), *example.shape[1:])
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(example.dtype)
    fewer = images[: len(example)]
    normalised = 4 * fewer - 2
    if not _is_finite(model, images):  # a network's own business: it may take so many images, and no others
        images = fewer
    return [images, normalised] if _is_finite(model, normalised) else [images]  # or no negative numbers


def _is_finite(model: nn.Module, images: Tensor) -> bool:
    """Whether a network runs on images, and gives numbers."""
    try:
        return all(bool(output.isfinite().all()) for output in tensors(model(images)))
    except Exception:
        return False


def _without_failing(model: nn.Module, groups: Groups, trial: Structure, example: Tensor, training: bool) -> Groups:
    """Tries every group on its own and freezes those that fail (a branch first gets the other kinds of zero)."""
    kept: list[ChannelGroup] = []
    frozen = dict(groups.frozen)
    for group in groups.groups:
        alone = _alone(groups, [group], trial)
        if group.kind == "depth":
            alone = Structure({**alone.masks, group.name: (False,)})
        reason = _fails(model, groups, alone, example, training)
        if reason and group.kind == "depth":
            for zero in ("scalar", "pair", "pairs"):
                other = dataclasses.replace(group, zero=zero)
                swapped = Groups(tuple(other if g is group else g for g in groups.groups), frozen)
                if not _fails(model, swapped, alone, example, training):
                    group, reason = other, ""
                    break
        if reason:
            frozen[group.name] = reason
        else:
            kept.append(group)
    smaller = Groups(tuple(kept), frozen)
    if len(kept) == len(groups.groups) and all(a is b for a, b in zip(kept, groups.groups, strict=True)):
        return _add_one_by_one(model, smaller, trial, example, training)
    return smaller


def _add_one_by_one(model: nn.Module, groups: Groups, trial: Structure, example: Tensor, training: bool) -> Groups:
    """Each group works alone, but not all together: keeps, in order, those that work with the ones before."""
    chosen: list[ChannelGroup] = []
    frozen = dict(groups.frozen)
    for group in groups.groups:
        reason = _fails(model, groups, _alone(groups, [*chosen, group], trial), example, training)
        if reason:
            frozen[group.name] = f"{reason} (together with other groups)"
        else:
            chosen.append(group)
    return Groups(tuple(chosen), frozen)
