"""Models: named ones (each family one file here), torchvision's classification and segmentation networks, one's own."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable

from torch import Tensor, nn

from passdeploy.errors import BadInput, nearest
from passdeploy.plugins import load_attribute, users_code

ModelFactory = Callable[..., nn.Module]
FILES = (".py", ".onnx", ".pt", ".pth", ".pkl", ".ckpt", ".bin", ".h5", ".safetensors", ".engine")
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

    models = torchvision().models
    return [str(name) for module in (models, models.segmentation) for name in models.list_models(module=module)]


def _torchvision(name: str) -> ModelFactory:
    """A torchvision network that trains as it runs: without auxiliary classifiers, and with one output.

    The factory takes `size`, (H, W) of the images, for the networks that are built for one size.
    """
    from passdeploy._torchvision import torchvision

    builder = torchvision().models.get_model_builder(name)
    takes = inspect.signature(builder).parameters
    fixed: dict[str, object] = {"weights_backbone": None} if "weights_backbone" in takes else {}
    if name in ("googlenet", "inception_v3"):
        # Pretrained weights were trained on inputs that the network itself brings to their scale.
        fixed = {"aux_logits": False, "init_weights": False, "transform_input": True}

    def make(num_classes: int = 1000, size: tuple[int, int] | None = None, **options: object) -> nn.Module:
        if size is not None and name.startswith("vit_"):
            options.setdefault("image_size", _square(name, size))
        if size is not None and name.startswith("maxvit_"):
            options.setdefault("input_size", size)
        network = builder(weights=None, num_classes=num_classes, **fixed, **options)
        return _with_one_output(network) if "weights_backbone" in takes else network

    return make


def _square(name: str, size: tuple[int, int]) -> int:
    if size[0] != size[1]:
        raise BadInput(f"--model {name}: takes square images, not {size[0]}x{size[1]}; set input_size")
    return size[0]


def _with_one_output(network: nn.Module) -> nn.Module:
    """A torchvision segmentation network whose output is the logits instead of a dictionary; its names stay."""
    kind = type(network)

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        """Maps normalised images (N, 3, H, W) to logits (N, classes, H, W)."""
        logits: Tensor = kind.forward(self, x)["out"]
        return logits

    network.__class__ = type(kind.__name__, (kind,), {"forward": forward})
    return network


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
        return load_attribute(name, "--model")
    if name in _torchvision_names():
        return _torchvision(name)
    if name.lower().endswith(FILES):
        raise BadInput(
            f"--model {name}: is the name of a file; give the function that builds the network as module:function "
            "(nets:build for build in nets.py), and a file of weights with --weights"
        )
    raise BadInput(f"--model {name}: no such model{nearest(name, known())}")


def _may_be_a_pair(default: object) -> bool:
    """Whether a parameter of this default may mean (H, W); one that is "tiny" or 224 means something else."""
    return default is None or default is inspect.Parameter.empty or isinstance(default, tuple | list)


def build(name: str | ModelFactory, num_classes: int, size: tuple[int, int] | None = None) -> nn.Module:
    """Builds a model with fresh weights.

    Args:
        name: Of a known model, or a factory.
        num_classes: Passed when the factory takes `num_classes`.
        size: (H, W) of the images, passed when the factory takes `size` (networks that are built for one size do) and
            its default, if any, is None or a pair.

    Raises:
        BadInput: No such model, or the factory does not return an `nn.Module`.
    """
    make = factory(name) if isinstance(name, str) else name
    if isinstance(make, nn.Module):
        raise BadInput(
            f"--model {name}: is a network, not a function that builds one; name a function that does, and give its "
            "weights with --weights"
        )
    label = name if isinstance(name, str) else getattr(name, "__qualname__", repr(name))
    parameters = inspect.signature(make).parameters
    given: dict[str, object] = {}
    if "num_classes" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        given["num_classes"] = num_classes
    if size is not None and "size" in parameters and _may_be_a_pair(parameters["size"].default):
        given["size"] = size
    with users_code(f"--model {label}: building it"):
        model = make(**given)
    if not isinstance(model, nn.Module):
        raise BadInput(f"--model {label}: returned {type(model).__name__}, expected a torch.nn.Module")
    return model
