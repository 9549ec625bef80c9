"""Surgery: removes units physically and leaves an ordinary, thinner, dense network.

What is removed is written down as an *architecture*: the kept indices per module and side, and the removed residual
branches. A fresh model from the same factory, cut by the same architecture, takes the thin model's weights.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from passdeploy.errors import BadInput, nearest
from passdeploy.groups.attention import cut_heads, describe, first_tensor, head_count
from passdeploy.groups.channels import PRODUCERS, side_size
from passdeploy.groups.frozen import is_frozen_norm
from passdeploy.groups.types import Groups
from passdeploy.groups.wrapped import replace_module
from passdeploy.structure import Structure
from passdeploy.weights import unwrap

SCHEMA = "passdeploy.architecture/1"


class Zero(nn.Module):
    """Stands where a removed branch was: returns zeros, which the exported graph folds away.

    Args:
        like: Zeros of the input's shape (an in-place addition needs them); else one zero of its rank.
        pair: Returns (zeros, None), as `nn.MultiheadAttention` does.
    """

    def __init__(self, like: bool = True, pair: bool = False) -> None:
        super().__init__()
        self.like, self.pair = like, pair

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Maps anything to zeros."""
        x = first_tensor(args, kwargs)
        zeros = torch.zeros_like(x) if self.like else x.new_zeros((1,) * x.ndim)
        return (zeros, None) if self.pair else zeros


def relative_difference(a: Tensor, b: Tensor) -> float:
    """``max|a - b| / max|a|``; infinite when shapes differ or something is not finite."""
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    if a.shape != b.shape or not (a.isfinite().all() and b.isfinite().all()):
        return float("inf")
    if a.numel() == 0:
        return 0.0
    return float((a - b).abs().max() / a.abs().max().clamp_min(1e-30))


def architecture(groups: Groups, structure: Structure) -> dict[str, Any]:
    """What a structure keeps, in terms of modules: kept indices per module and side, removed branches. JSON-able.

    Raises:
        BadInput: The structure is not one of these groups, or empties a group.
    """
    structure = groups.canonical(structure)
    removed: list[dict[str, Any]] = []
    gone: set[str] = set()
    for group in groups.groups:
        if group.kind == "depth" and not structure.masks[group.name][0]:
            removed.append(
                {
                    "name": group.name,
                    "modules": list(group.branch),
                    "starts": list(group.starts),
                    "gate": group.gate,
                    "zero": group.zero,
                }
            )
            gone |= set(group.branch)
    kept: dict[str, dict[str, Any]] = {}
    for group in groups.groups:
        for member in group.members:
            if member.module in gone:
                continue
            side = kept.setdefault(member.module, {}).setdefault(
                member.side, {"of": member.size, "kept": set(range(member.size))}
            )
            for channels, keep in zip(member.channels, structure.masks[group.name], strict=True):
                if not keep:
                    side["kept"] -= set(channels)
    modules = {
        name: {side: {"of": entry["of"], "kept": sorted(entry["kept"])} for side, entry in sides.items()}
        for name, sides in kept.items()
    }
    return {"schema": SCHEMA, "modules": modules, "branches": removed}


def _select(module: nn.Module, name: str, dimension: int, kept: Tensor) -> None:
    """Keeps the chosen indices of one of a module's parameters or buffers, when it has it."""
    value = getattr(module, name, None)
    if not isinstance(value, Tensor):
        return
    chosen = value.detach().index_select(dimension, kept.to(value.device)).clone()
    if isinstance(value, nn.Parameter):
        setattr(module, name, nn.Parameter(chosen, requires_grad=value.requires_grad))
    else:
        setattr(module, name, chosen)


def weight_cuts(
    layer: nn.Module, outside: Sequence[int] | None, inside: Sequence[int] | None
) -> dict[int, Sequence[int]]:
    """What is left of the weight of a convolution or linear layer: kept indices per dimension, others are whole.

    Args:
        layer: The dense one. A grouped convolution is cut by its outputs: whole groups go, and their inputs with them.
        outside: Kept output channels, ascending; None: all.
        inside: Kept input channels; None: all.

    Raises:
        ValueError: A grouped convolution is cut by its inputs, or within a group.
    """
    if getattr(layer, "groups", 1) == 1:
        in_dimension, out_dimension = (0, 1) if getattr(layer, "transposed", False) else (1, 0)
        return {d: kept for d, kept in ((in_dimension, inside), (out_dimension, outside)) if kept is not None}
    assert isinstance(layer, nn.modules.conv._ConvNd)
    if inside is not None or outside is None:
        raise ValueError("a grouped convolution is cut by its outputs")
    each_out, each_in = layer.out_channels // layer.groups, layer.in_channels // layer.groups
    groups = sorted({channel // each_out for channel in outside})
    if len(groups) * each_out != len(outside):
        raise ValueError("a grouped convolution loses whole groups only")
    return {0: [group * each_in + i for group in groups for i in range(each_in)] if layer.transposed else outside}


def _cut_layer(layer: nn.modules.conv._ConvNd | nn.Linear, outside: Tensor | None, inside: Tensor | None) -> None:
    """Slices weight and bias, and corrects the sizes that the layer states."""
    kept_out, kept_in = (None if kept is None else kept.tolist() for kept in (outside, inside))
    for dimension, kept in weight_cuts(layer, kept_out, kept_in).items():
        _select(layer, "weight", dimension, torch.tensor(kept))
    if outside is not None:
        _select(layer, "bias", 0, outside)
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
        return
    if layer.groups > 1 and outside is not None:
        left = len(outside) * layer.groups // layer.out_channels
        layer.in_channels, layer.groups = layer.in_channels // layer.groups * left, left
    elif inside is not None:
        layer.in_channels = len(inside)
    if outside is not None:
        layer.out_channels = len(outside)


def _cut_per_channel(module: nn.Module, kept: Tensor) -> None:
    for name in ("weight", "bias", "running_mean", "running_var"):
        _select(module, name, 0, kept)


def _cut(module: nn.Module, outside: Tensor | None, inside: Tensor | None) -> None:
    """Slices one module in place and keeps its attributes true."""
    if isinstance(module, PRODUCERS):
        _cut_layer(module, outside, inside)
        return
    if inside is not None or outside is None:
        raise ValueError("it has no input side of its own")
    if isinstance(module, nn.modules.batchnorm._NormBase) or is_frozen_norm(module):
        _cut_per_channel(module, outside)
        if "num_features" in vars(module):  # some libraries' frozen norms state none
            vars(module)["num_features"] = len(outside)
    elif isinstance(module, nn.GroupNorm):
        each = module.num_channels // module.num_groups
        if len(outside) % each or len(torch.unique(outside // each)) * each != len(outside):
            raise ValueError("a group norm loses whole groups only")
        _cut_per_channel(module, outside)
        module.num_channels, module.num_groups = len(outside), len(outside) // each
    elif isinstance(module, nn.PReLU):
        _cut_per_channel(module, outside)
        module.num_parameters = len(outside)
    elif head_count(module) is not None:
        cut_heads(module, outside)
    else:
        raise ValueError(f"a {type(module).__name__} can't be cut")


def _remove_branch(model: nn.Module, branch: Mapping[str, Any]) -> None:
    """The gate becomes `Zero`, what the branch's input feeds becomes `Zero` too, the rest identities.

    Without the second an in-place activation inside the branch would change the branch's input, which lives on.
    """
    modules = {name: model.get_submodule(name) for name in branch["modules"]}
    # told by their layers, which go first
    attentions = {name for name, module in modules.items() if describe(module) is not None}
    for name, module in modules.items():
        pair = isinstance(module, nn.MultiheadAttention) or (branch["zero"] == "pairs" and name in attentions)
        if name == branch["gate"]:
            stand_in: nn.Module = Zero(like=branch["zero"] != "scalar", pair=pair or branch["zero"] == "pair")
        else:
            stand_in = Zero(pair=pair) if name in branch["starts"] or pair else nn.Identity()
        replace_module(model, name, stand_in.train(model.training))


def _sides(entry: Mapping[str, Any], module: nn.Module) -> dict[str, Tensor]:
    sides = {}
    for side, indices in entry.items():
        if side not in ("in", "out"):
            raise ValueError(f"has no side {side!r}")
        kept, size = list(indices["kept"]), indices["of"]
        actual = side_size(module, side)  # type: ignore[arg-type]
        if size != actual:
            raise ValueError(f"has {actual} {side} channels, the architecture was cut from {size}")
        if any(type(index) is not int for index in kept):
            raise ValueError(f"keeps {side} channels that are no whole numbers")
        if not kept or sorted(set(kept)) != kept or kept[0] < 0 or kept[-1] >= size:
            raise ValueError(f"keeps {side} channels that are empty, repeated, unsorted or outside 0..{size - 1}")
        if len(kept) < size:
            sides[side] = torch.tensor(kept)
    return sides


def apply_architecture(model: nn.Module, arch: Mapping[str, Any]) -> nn.Module:
    """Cuts a copy of a dense network down to an architecture.

    Args:
        model: The dense network; it is not changed.
        arch: From `architecture`, or read from ``architecture.json``.

    Returns:
        The thin network, with the weights that are left.

    Raises:
        BadInput: The architecture is malformed or was not made from this network.
    """
    if not isinstance(arch, Mapping) or arch.get("schema") != SCHEMA:
        found = arch.get("schema") if isinstance(arch, Mapping) else type(arch).__name__
        raise BadInput(f"architecture: schema is {found!r}, expected {SCHEMA!r}")
    model = unwrap(model)
    clone = copy.deepcopy(model)
    known = {name for name, _ in clone.named_modules(remove_duplicate=False)}
    name = ""
    try:
        for branch in arch["branches"]:
            for name in (*branch["modules"], *branch["starts"], branch["gate"]):
                _require(name, known)
            _remove_branch(clone, branch)
        for name, entry in arch["modules"].items():
            _require(name, known)
            module = clone.get_submodule(name)
            sides = _sides(entry, module)
            if sides:
                _cut(module, sides.get("out"), sides.get("in"))
        _restate_sizes(model, clone)
    except (KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"architecture: malformed near {name!r} ({type(error).__name__}: {error})") from None
    except ValueError as error:
        raise BadInput(f"architecture: does not fit the model: {name} {error}") from None
    return clone


def _restate_sizes(dense: nn.Module, thin: nn.Module) -> None:
    """Corrects lists in which a module keeps its children's input channels, and by which it splits its input.

    Such a list (`splits` of a mixed convolution) is known by its values: those of all layers among the children.
    """
    left = dict(thin.named_modules())
    for name, module in dense.named_modules():
        before, cut = _inputs(module), left.get(name)
        if len(before) < 2:
            continue
        after = _inputs(cut) if cut is not None else before
        if after == before or len(after) != len(before):
            continue
        for attribute, value in vars(module).items():
            if isinstance(value, (list, tuple)) and list(value) == before:
                setattr(cut, attribute, type(value)(after))


def _inputs(module: nn.Module) -> list[int]:
    sizes = (side_size(child, "in") for child in module.children())
    return [size for size in sizes if size is not None]


def _require(name: str, known: set[str]) -> None:
    if name not in known or not name:
        raise BadInput(f"architecture: does not fit the model: there is no module {name!r}{nearest(name, known)}")


def thin(model: nn.Module, groups: Groups, structure: Structure) -> nn.Module:
    """The network without the units that a structure drops; the dense one is not changed."""
    return apply_architecture(model, architecture(groups, structure))


@torch.no_grad()
def numbered(model: nn.Module) -> nn.Module:
    """A copy of a network, on the CPU, whose state holds the positions of its values in the flattened tensors.

    What is cut from it tells where it was cut from. A tensor that is no number, such as a mask of truth values, can't
    hold positions; nothing is cut from those.
    """
    twin = copy.deepcopy(unwrap(model)).cpu()
    for module in twin.modules():
        for values in (module._parameters, module._buffers):
            for name, value in values.items():
                if value is None or name in module._non_persistent_buffers_set:
                    continue
                positions = torch.arange(value.numel()).reshape(value.shape)
                # float64 holds every position exactly
                value.data = positions.to(torch.float64 if value.is_floating_point() else value.dtype)
    return twin


@torch.no_grad()
def positions(model: nn.Module, groups: Groups, structure: Structure) -> dict[str, Tensor]:
    """Where the values of a thin network's state were cut from: positions in the dense one's flattened tensors."""
    return thin(numbered(model), groups, structure).state_dict()


@torch.no_grad()
def put_back(model: nn.Module, groups: Groups, structure: Structure, thinner: nn.Module) -> dict[str, Tensor]:
    """The state of a dense network in which a thin one's values stand where they were cut from.

    Args:
        model: The dense network; it is not changed.
        groups: Of it.
        structure: What the thin one was cut to.
        thinner: The thin network, trained since.
    """
    where = positions(model, groups, structure)
    state = {name: value.clone() for name, value in unwrap(model).state_dict().items()}
    for name, value in thinner.state_dict().items():
        if value.shape == state[name].shape:  # nothing was cut from it: a mask of truth values can't hold positions
            state[name] = value.to(state[name], copy=True)
            continue
        flat = state[name].flatten()
        flat[where[name].flatten().long().to(flat.device)] = value.flatten().to(flat)
        state[name] = flat.reshape(state[name].shape)
    return state
