"""Models: named ones (each family one file here), every torchvision classification network, and the user's own."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable

from torch import nn

from passdeploy.errors import BadInput, PassdeployError, nearest

ModelFactory = Callable[..., nn.Module]
_REGISTRY: dict[str, ModelFactory] = {}


def register(name: str) -> Callable[[ModelFactory], ModelFactory]:
    """Registers a model factory that takes `num_classes`."""

    def add(factory: ModelFactory) -> ModelFactory:
        _REGISTRY[name] = factory
        return factory

    return add


def _own() -> list[str]:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return sorted(_REGISTRY)


def _torchvision_names() -> list[str]:
    from passdeploy._torchvision import torchvision

    vision = torchvision()
    return [str(name) for name in vision.models.list_models(module=vision.models)]


def known() -> list[str]:
    """Names of all models that can be asked for by name."""
    return sorted({*_own(), *_torchvision_names()})


def factory(name: str) -> ModelFactory:
    """Returns the factory of a model: a registered name, a torchvision name, or ``module:function``.

    Raises:
        BadInput: No such model.
    """
    if name in _own():
        return _REGISTRY[name]
    if ":" in name:
        from passdeploy.plugins import load_attribute

        return load_attribute(name, "--model")
    if name in _torchvision_names():
        from passdeploy._torchvision import torchvision

        builder: ModelFactory = torchvision().models.get_model_builder(name)
        return lambda num_classes=1000: builder(weights=None, num_classes=num_classes)
    raise BadInput(f"--model {name}: no such model{nearest(name, known())}")


def build(name: str | ModelFactory, num_classes: int) -> nn.Module:
    """Builds a model with fresh weights; `num_classes` is passed when the factory takes it.

    Raises:
        BadInput: No such model, or the factory does not return an `nn.Module`.
    """
    make = factory(name) if isinstance(name, str) else name
    label = name if isinstance(name, str) else getattr(name, "__qualname__", repr(name))
    parameters = inspect.signature(make).parameters
    takes = "num_classes" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    try:
        model = make(num_classes=num_classes) if takes else make()
    except PassdeployError:
        raise
    except Exception as error:
        raise BadInput(f"--model {label}: building it failed: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise BadInput(f"--model {label}: returned {type(model).__name__}, expected a torch.nn.Module")
    return model
