"""Finds all channel groups and depth units of a network."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from passdeploy.errors import BadInput, nearest
from passdeploy.groups.attention import Attention, attentions, describe, gate_name, put_stand_ins, replaceable
from passdeploy.groups.channels import PRODUCERS, Unit, channel_units, side_size
from passdeploy.groups.check import calibrate, drop_what_fails, first_line, randomise
from passdeploy.groups.control import matches
from passdeploy.groups.depth import branches
from passdeploy.groups.frozen import is_frozen_norm, thaw
from passdeploy.groups.heads import with_heads
from passdeploy.groups.types import ChannelGroup, Groups, Member, Side
from passdeploy.groups.wrapped import copied, plain_network, uncuttable

_Signature = tuple[tuple[tuple[str, Side], int], ...]


def execution_order(model: nn.Module, example: Tensor) -> dict[str, int]:
    """Position of every module that runs (parents included) in the order of the first calls."""
    order: dict[str, int] = {}
    names = {module: name for name, module in model.named_modules()}

    def record(module: nn.Module, _: object) -> None:
        order.setdefault(names[module], len(order))

    hooks = [module.register_forward_pre_hook(record) for module in names]
    try:
        with torch.no_grad():
            model(example)
    finally:
        for hook in hooks:
            hook.remove()
    return order


def _traceable_copy(model: nn.Module) -> nn.Module:
    """A float32 copy on the CPU in eval mode whose parameters require gradients."""
    clone = copied(model).cpu().float().eval()
    for parameter in clone.parameters():  # a table of indices has no gradient
        parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
    return clone


def _kept_values(model: nn.Module) -> dict[str, Tensor]:
    """The buffers of numbers that are no norm's, such as running averages of features."""
    return {
        f"{name}.{key}": buffer
        for name, module in model.named_modules()
        if not isinstance(module, nn.modules.batchnorm._NormBase) and not is_frozen_norm(module)
        for key, buffer in module.named_buffers(recurse=False)
        if buffer.ndim > 0 and buffer.is_floating_point()
    }


def _does_more_in_training(model: nn.Module, example: Tensor, order: Mapping[str, int]) -> bool:
    """Whether training mode runs layers (an auxiliary classifier) or writes buffers that evaluation does not come to.

    Args:
        model: In eval mode; it is not changed.
        example: An input, for its shape.
        order: Of the modules that run in eval mode.
    """
    left = {name for name, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))}
    left -= order.keys()
    before = _kept_values(model)
    if not left and not before:
        return False
    trained = copy.deepcopy(model).train()
    images = torch.rand(example.shape, generator=torch.Generator().manual_seed(0))  # an average of zeros stays zero
    try:
        with torch.random.fork_rng(devices=()):  # dropout draws
            ran = execution_order(trained, images)
    except Exception:  # such as a batch norm over a single value: not even the whole network shows it
        return False
    after = _kept_values(trained)
    return bool(left & ran.keys()) or any(
        name in after and not torch.equal(value, after[name]) for name, value in before.items()
    )


def _exclude(units: list[Unit], model: nn.Module, patterns: Sequence[str]) -> None:
    """Freezes the units that an excluded layer produces.

    Raises:
        BadInput: A pattern names no convolution or linear layer.
    """
    layers = [name for name, module in model.named_modules() if isinstance(module, PRODUCERS)]
    for pattern in patterns:
        if not any(matches(layer, [pattern]) for layer in layers):
            raise BadInput(
                f"exclude {pattern!r}: names no convolution or linear layer of the network{nearest(pattern, layers)}"
            )
    for unit in units:
        if any(side == "out" and matches(name, patterns) for name, side in unit.channels):
            unit.reason = unit.reason or "excluded by the user"


def _groups_of_units(
    units: list[Unit], model: nn.Module, order: dict[str, int]
) -> tuple[list[ChannelGroup], dict[str, str]]:
    """Collects units that own the same number of channels in the same members into groups."""
    modules = dict(model.named_modules())
    alike: dict[_Signature, list[Unit]] = {}
    frozen: dict[str, str] = {}

    def produces(key: tuple[str, Side]) -> bool:
        module = modules[key[0]]
        return key[1] == "out" and (isinstance(module, PRODUCERS) or describe(module) is not None)

    def freeze(unit: Unit, reason: str) -> None:
        for key in filter(produces, unit.channels):
            frozen.setdefault(key[0], reason)

    last = len(order)
    for unit in units:
        if unit.reason or not any(map(produces, unit.channels)):
            freeze(unit, unit.reason or "nothing produces its channels")
            continue
        keys = sorted(unit.channels, key=lambda key: (order.get(key[0], last), key[0], key[1] == "in"))
        signature = tuple((key, len(unit.channels[key])) for key in keys)
        alike.setdefault(signature, []).append(unit)
    groups: list[ChannelGroup] = []
    taken: dict[str, int] = {}
    for signature, members in alike.items():
        first = next(key[0] for key, _ in signature if produces(key))
        if len(members) < 2:
            freeze(members[0], "its channels can only go all together")
            continue
        members.sort(key=lambda unit: min(unit.channels[(first, "out")]))
        taken[first] = taken.get(first, 0) + 1
        name = first if taken[first] == 1 else f"{first}:{taken[first]}"
        groups.append(
            ChannelGroup(
                name,
                "channel",
                len(members),
                tuple(
                    Member(
                        module,
                        side,
                        tuple(tuple(sorted(unit.channels[(module, side)])) for unit in members),
                        side_size(modules[module], side) or 0,
                    )
                    for (module, side), _ in signature
                ),
            )
        )
    pruned = {member.module for group in groups for member in group.members if member.side == "out"}
    return groups, {name: reason for name, reason in frozen.items() if name not in pruned}


def _unreached(model: nn.Module, groups: Sequence[ChannelGroup], frozen: Mapping[str, str]) -> dict[str, str]:
    """The layers that the graph did not come to: nothing is known of them, and so nothing is done to them."""
    pruned = {member.module for group in groups for member in group.members if member.side == "out"}
    inside = [name for name, _, _ in attentions(model)]
    whole = {a for a in inside if any(module == a or module.startswith(f"{a}.") for module in pruned)}
    reasons = {}
    for name, module in model.named_modules():
        if not isinstance(module, PRODUCERS) or name in pruned or name in frozen:
            continue
        parent = next((a for a in inside if name.startswith(f"{a}.")), "")
        reasons[name] = (
            f"it is part of the attention {parent}, "
            + ("of which whole heads go" if parent in whole else "whose heads stay: it is not a plain self-attention, ")
            + ("" if parent in whole else "or its weights are read")
            if parent
            else "the traced graph does not come to it: it is not used, or no gradient gets through what is behind it"
        )
    return reasons


def _units(model: nn.Module, example: Tensor) -> list[Unit]:
    """All units of a network; attentions are followed through their stand-ins, frozen norms through batch norms."""
    specs: dict[str, Attention] = replaceable(model, example)
    traced = copy.deepcopy(model)
    thaw(traced)
    if not specs:
        return channel_units(traced, example)
    put_stand_ins(traced, specs)
    return with_heads(channel_units(traced, example), specs)


def _position(group: ChannelGroup, order: dict[str, int]) -> tuple[int, int]:
    if group.kind == "depth":
        return min(order.get(name, len(order)) for name in group.branch), 0
    return order.get(group.name.split(":")[0], len(order)), 1


def find_groups(
    model: nn.Module, example: Tensor, *, exclude: Sequence[str] = (), depth: bool = True, check: bool = True
) -> Groups:
    """Finds what can be removed from a network: channel groups (from Torch-Pruning's DepGraph) and residual branches.

    The network itself is neither changed nor moved: a copy is traced, and with `check` every group is tried on it
    (masked and physically removed must agree); what does not work is frozen, with the reason.

    Args:
        model: The network (without its input stage).
        example: An input, such as (1, 3, H, W).
        exclude: Names or patterns (``layer4.*``) of layers whose channels, or blocks, must stay.
        depth: Whether residual branches are looked for.
        check: Whether groups are tried out.

    Returns:
        Groups in execution order.

    Raises:
        BadInput: The network can't run on the example, or a pattern of `exclude` names nothing.
    """
    clone = _traceable_copy(plain_network(model))
    example = example.detach().cpu().float()
    try:
        order = execution_order(clone, example)
    except Exception as error:
        raise BadInput(
            f"the network can't process an input of shape {tuple(example.shape)}: {first_line(error)}"
        ) from error
    training = check and _does_more_in_training(clone, example, order)
    frozen: dict[str, str] = {}
    try:
        units = _units(clone, example)
    except Exception as error:
        units, frozen["channels"] = [], f"the network's graph can't be followed: {first_line(error)}"
    _exclude(units, clone, exclude)
    apart = uncuttable(clone)
    for unit in units:
        met = next((name for name, _ in unit.channels if name in apart), None)
        unit.reason = unit.reason or ("" if met is None else f"its channels meet {met}: {apart[met]}")
    found, stuck = _groups_of_units(units, clone, order)
    frozen |= {name: apart.get(name, why) for name, why in stuck.items()}
    frozen |= _unreached(clone, found, frozen)
    if depth:
        try:
            traced = copy.deepcopy(clone)
            thaw(traced)
            ways, opaque = branches(traced)
        except Exception as error:
            ways, opaque = [], {}
            frozen["depth"] = f"the network can't be traced symbolically: {first_line(error)}"
        for b in ways:
            if any(matches(name, exclude) for name in (b.name, *b.modules)):
                frozen[f"depth:{b.name}"] = "excluded by the user"
                continue
            block = ChannelGroup(f"depth:{b.name}", "depth", 1, branch=b.modules, gate=b.gate, starts=b.starts)
            why = apart.get(gate_name(clone, b.gate))  # the weight that is masked with the block
            if why is None:
                found.append(block)
            else:
                frozen[block.name] = why
        for name, why in opaque.items():
            frozen.setdefault(name, f"its code can't be traced symbolically, so that no block in it can go: {why}")
    found.sort(key=lambda group: _position(group, order))
    groups = Groups(tuple(found), frozen)
    if not check or not found:
        return groups
    randomise(clone)
    calibrate(clone, example.shape[1:])
    return drop_what_fails(clone, groups, example, training)
