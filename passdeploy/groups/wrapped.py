"""Networks in wrappers, modules of several names, and parameters that surgery must leave alone."""

from __future__ import annotations

import copy
from collections import defaultdict

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from passdeploy.errors import BadInput
from passdeploy.weights import unwrap


def plain_network(model: nn.Module) -> nn.Module:
    """The network inside `torch.compile`, `DataParallel` and `DistributedDataParallel`, if it is one that can be cut.

    Raises:
        BadInput: It is TorchScript, quantised, has weights computed by hooks, or layers that no input has given a shape
            yet.
    """
    model = unwrap(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise BadInput("the network is TorchScript, which can't be cut; give the nn.Module it was made from")
    for name, module in model.named_modules():
        quantised = type(module).__module__.startswith(("torch.ao.nn.quantized", "torch.nn.quantized"))
        if quantised and not type(module).__name__.endswith("FloatFunctional"):  # those of networks that are prepared
            raise BadInput(f"the network is quantised ({name}); give the float network, and ask for --precision int8")
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, WeightNorm | SpectralNorm | BasePruningMethod):
                raise BadInput(
                    f"{name} has a weight that a hook computes ({type(hook).__name__}), which can't be copied; take it "
                    "off (torch.nn.utils.remove_weight_norm, remove_spectral_norm, prune.remove), or use "
                    "torch.nn.utils.parametrizations instead"
                )
    if any(isinstance(p, nn.UninitializedParameter | nn.UninitializedBuffer) for p in _tensors(model)):
        raise BadInput("the network has lazy layers without a shape; run one forward pass first")
    return model


def copied(model: nn.Module) -> nn.Module:
    """A copy of a user's network, which is left as it is.

    Raises:
        BadInput: It can't be copied; mostly because of what a forward pass with gradients has left in it.
    """
    try:
        return copy.deepcopy(model)
    except Exception as error:
        kept = [
            f"{name}.{key}" if name else key
            for name, module in model.named_modules()
            for key, value in vars(module).items()
            if isinstance(value, torch.Tensor) and not value.is_leaf
        ]
        advice = "give a function that builds it"
        if kept:
            advice = f"{kept[0]} holds what a forward pass left there: run one under torch.no_grad() first, or {advice}"
        reason = str(error).strip().partition("\n")[0][:160] or type(error).__name__
        raise BadInput(f"the network can't be copied ({reason}); {advice}") from error


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts a module where another is, under all names that this is registered under: `forward` may use any of them."""
    old = model.get_submodule(name)
    for parent in list(model.modules()):
        for leaf, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, leaf, module)


def first_names(model: nn.Module) -> dict[str, str]:
    """Every name of every module, with the one that `named_modules` has for it: under which it is registered first."""
    first = {module: name for name, module in model.named_modules()}
    return {name: first[module] for name, module in model.named_modules(remove_duplicate=False)}


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def uncuttable(model: nn.Module) -> dict[str, str]:
    """Modules whose parameters can't be sliced on their own, with the reason: shared between modules, or computed."""
    owners: dict[int, list[str]] = defaultdict(list)
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)].append(name)
        if parametrize.is_parametrized(module):
            found[name] = "its weight is computed (parametrised); torch.nn.utils.parametrize can remove that"
    for names in owners.values():
        for name in names:
            if len(set(names)) > 1:
                others = ", ".join(sorted(set(names) - {name})[:3])
                found.setdefault(name, f"it shares a parameter with {others}")
    return found
