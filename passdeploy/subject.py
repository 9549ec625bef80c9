"""What a run works on: the network, its data, its groups. Loaded from names, files, or the caller's own objects."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from passdeploy import data as datasets
from passdeploy import models
from passdeploy.config import PromptConfig, RunConfig
from passdeploy.data.base import ImageData, resized
from passdeploy.data.checks import check_data
from passdeploy.errors import BadInput
from passdeploy.groups import Groups, Operator, control, find_groups, operators
from passdeploy.groups.wrapped import copied, plain_network
from passdeploy.network_checks import check_builds, check_outputs, check_state
from passdeploy.plugins import users_code
from passdeploy.restoring import restore
from passdeploy.tasks import Task, get_task, task_of
from passdeploy.weights import load_weights, packaged_weights

Model = str | nn.Module | Callable[..., nn.Module]


@dataclass
class Subject:
    """The network and data of a run.

    Attributes:
        config: Of the run.
        data: With the configuration's size and normalisation.
        network: With fresh weights, or those that were given.
        name: Of the model, for people.
        weights: Where the weights came from; None: they have to be trained.
        build: Makes the same architecture again.
    """

    config: RunConfig
    data: ImageData
    network: nn.Module
    name: str
    weights: str | None
    build: Callable[[], nn.Module]

    @cached_property
    def task(self) -> Task:
        """What the outputs mean."""
        return task_of(self.data)

    @cached_property
    def example(self) -> Tensor:
        """A normalised input (2, 3, H, W)."""
        return torch.zeros(2, *self.data.input_shape)

    @cached_property
    def groups(self) -> Groups:
        """Channel groups and depth units of the network."""
        asked = self.config.groups
        found = find_groups(self.network, self.example, exclude=asked.exclude)
        return control(found, min_width=asked.min_width, fixed=asked.fixed, tie=asked.tie)

    @cached_property
    def operators(self) -> tuple[Operator, ...]:
        """What the network executes."""
        return operators(self.network, self.example[:1], self.groups)

    def with_state(self, state: dict[str, Tensor]) -> nn.Module:
        """A fresh network of the dense architecture with these weights, in eval mode."""
        network = self.build()
        restore(network, state)
        return network.eval()

    @cached_property
    def data_digest(self) -> str:
        """SHA-256 that tells the data from others, see `ImageData.digest`, and a task of one's own by its code."""
        digest = self.data.digest()
        with users_code(f"task {self.task.name}: its metric"):
            kinds = {*type(self.task).__mro__, *type(self.task.metric(self.data.num_classes)).__mro__}
        own = _sources(kind for kind in kinds if kind.__module__.split(".")[0] not in ("passdeploy", "typing", "abc"))
        return hashlib.sha256("\n".join([digest, *own]).encode()).hexdigest() if own else digest

    @cached_property
    def architecture(self) -> str:
        """SHA-256 over what the network executes, whatever its weights: what its latency depends on."""
        return hashlib.sha256(self._executed.encode()).hexdigest()

    @cached_property
    def _executed(self) -> str:
        return _described(self.network) + repr(self.operators)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the architecture, and the weights when they were given.

        Networks whose parameters have the same shapes need not be the same function: strides, activations and what
        `forward` does with them count as well. What `forward` calls outside its class is not seen.
        """
        h = hashlib.sha256(self._executed.encode())
        for name, tensor in self.network.state_dict().items():
            h.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            if self.weights is not None:
                h.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        h.update(repr([(group.name, group.units) for group in self.groups.groups]).encode())
        return h.hexdigest()


def _described(network: nn.Module) -> str:
    """Modules, their plain attributes, and the source of their classes where there is one; the same in each process."""
    parts = [repr(network)]
    for name, module in network.named_modules():
        values = {key: value for key, value in vars(module).items() if key != "training" and _is_plain(value)}
        parts.append(f"{name} {type(module).__qualname__} {sorted(values.items())}")
    parts += _sources({kind for module in network.modules() for kind in type(module).__mro__})
    return re.sub(r"0x[0-9a-f]+", "", "\n".join(parts))  # where a function lies in memory


def _sources(kinds: Iterable[type]) -> list[str]:
    """Of classes that are not PyTorch's, where there is one; in the same order in each process."""
    found = []
    for kind in sorted(kinds, key=lambda kind: (kind.__module__, kind.__qualname__)):
        if kind.__module__.split(".")[0] not in ("builtins", "torch"):
            with contextlib.suppress(OSError, TypeError):  # typed into a console, or made while running
                found.append(inspect.getsource(kind))
    return found


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def _load_data(given: str | ImageData, config: RunConfig) -> ImageData:
    data = datasets.load(given, size=config.input_size) if isinstance(given, str) else given
    if config.input_size is not None:
        data = resized(data, config.input_size)
    changes: dict[str, Any] = {}
    if config.mean is not None:
        changes["mean"] = config.mean
    if config.std is not None:
        changes["std"] = config.std
    if config.task is not None and task_of(data).name != get_task(config.task).name:
        raise BadInput(f"--task {config.task}: {data.name} is for {task_of(data).name}; give data with labels for it")
    if changes:
        data = dataclasses.replace(data, preprocess=dataclasses.replace(data.preprocess, **changes))
    _check_task(task_of(data), data)
    check_data(data, task_of(data))
    return data


def _check_prompt(prompt: PromptConfig, data: ImageData) -> None:
    """Refuses an expansive prompt that has no border, leaves nothing of the image inside it, or moves what is judged.

    Where every pixel has a label, those of the labels would have to shrink as well.
    """
    if prompt.kind != "expansive":
        return
    if len(task_of(data).output_shape(data)) > 1:
        raise BadInput(
            "prompt: kind expansive shrinks the image away from its labels, which are one per pixel; "
            "set prompt.kind to additive or none"
        )
    side = min(data.preprocess.size)
    if not 0 < 2 * prompt.width < side:
        raise BadInput(
            f"prompt: kind expansive with width {prompt.width}: the border of an image of {data.name} takes "
            f"1 to {(side - 1) // 2} pixels; set prompt.width"
        )


def _check_task(task: Task, data: ImageData) -> None:
    """Refuses a task whose outputs no bundle can describe: better now than after the training."""
    shape = task.output_shape(data)
    if len(shape) not in (1, 3) or shape[0] != data.num_classes:
        raise BadInput(
            f"task {task.name}: an image's outputs have shape {shape}; only ({data.num_classes},) and "
            f"({data.num_classes}, H, W), the classes of {data.name} first, can be shipped"
        )


def _trainable(network: nn.Module) -> nn.Module:
    """The same network in float32 on the CPU, where every weight learns.

    Weights that someone froze for a training of their own have to adapt like others to what is pruned around them.
    """
    network = network.cpu().float()
    for parameter in network.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return network


def _diverged(network: nn.Module) -> bool:
    """Whether what a training left is not finite; infinities in buffers that no training changes are masks."""
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    trained = [*network.parameters(), *(buffer for norm in norms for buffer in norm.buffers(recurse=False))]
    unknown = any(bool(value.isnan().any()) for value in network.state_dict().values())
    return unknown or not all(bool(value.isfinite().all()) for value in trained)


def load_subject(config: RunConfig, model: Model | None = None, data: ImageData | None = None) -> Subject:
    """Loads what a run works on.

    Args:
        config: Names and files; `config.model` and `config.data` are used where no object is given.
        model: A factory, or a network (its weights count as trained).
        data: A data set.

    Raises:
        BadInput: Anything of it can't be used; one line says what.
    """
    images = _load_data(data if data is not None else str(config.data), config)
    _check_prompt(config.prompt, images)
    chosen: Model = model if model is not None else str(config.model)
    torch.manual_seed(config.seed)
    if isinstance(chosen, nn.Module):
        network = _trainable(copied(plain_network(chosen)))
        name, weights = type(network).__name__, "the caller's network"

        def build() -> nn.Module:
            return copy.deepcopy(network).train()  # some modules forget there what they worked out from their weights
    else:

        def build() -> nn.Module:
            return _trainable(plain_network(models.build(chosen, images.num_classes, images.preprocess.size)))

        name = chosen if isinstance(chosen, str) else getattr(chosen, "__qualname__", "model")
        network, weights = build(), None
    check_state(network, name)
    check_outputs(network, images, name, config.batch)
    if not isinstance(chosen, nn.Module):
        check_builds(network, build, images, name)
    if config.weights is not None:
        load_weights(network, config.weights)
        weights = str(config.weights)
    elif weights is None and isinstance(chosen, str):
        packaged = packaged_weights(chosen, images)
        if packaged is not None:
            load_weights(network, packaged)
            weights = f"shipped with passdeploy ({packaged.name})"
    if weights is not None and _diverged(network):
        raise BadInput(f"--model {name}: its weights hold NaN or infinity; train it again")
    # Through train mode: it has run with other weights, and some modules keep what they made of those.
    subject = Subject(config, images, network.train().eval(), name, weights, build)
    if not subject.groups.groups:
        reasons = "; ".join(f"{module}: {why}" for module, why in list(subject.groups.frozen.items())[:3])
        raise BadInput(f"--model {name}: nothing in it can be pruned ({reasons}); passdeploy groups lists every reason")
    return subject
