"""What a user's network has to keep to, checked before anything is trained."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from passdeploy.data.base import ImageData
from passdeploy.errors import BadInput
from passdeploy.groups.check import first_line
from passdeploy.restoring import restore
from passdeploy.surgery import relative_difference
from passdeploy.tasks import task_of

SAME = 1e-3
"""Largest relative difference between two runs of a network on the same images."""


def _images(data: ImageData) -> Tensor:
    return torch.rand(2, *data.input_shape, generator=torch.Generator().manual_seed(0))


def _same(first: object, second: object) -> bool:
    """Whether outputs are the same, as far as they can be compared."""
    comparable = isinstance(first, Tensor) and isinstance(second, Tensor) and bool(first.isfinite().all())
    return not comparable or relative_difference(first, second) <= SAME  # type: ignore[arg-type]


def _check_repeats(network: nn.Module, data: ImageData, name: str) -> None:
    """Refuses a network that computes something else each time: nothing could be proven of it."""
    images = _images(data)
    with torch.no_grad(), torch.random.fork_rng(devices=()):
        same = _same(network(images), network(images))
    if not same:
        raise BadInput(
            f"--model {name}: gives other outputs for the same images, in evaluation too; a dropout in functional "
            "form wants training=self.training"
        )


def check_builds(network: nn.Module, build: Callable[[], nn.Module], data: ImageData, name: str) -> None:
    """Refuses a factory whose networks are not the same with the same weights: another one would be shipped."""
    with torch.no_grad(), torch.random.fork_rng(devices=()):
        second, images = build(), _images(data)
        try:
            restore(second, network.state_dict())
            same = _same(network(images), second.eval()(images))
        except RuntimeError:  # other names or shapes
            same = False
    if not same:
        raise BadInput(
            f"--model {name}: builds another network each time, also with the same weights; what it draws at random "
            "has to be in its state_dict (a parameter, or a buffer with persistent=True)"
        )


def check_state(network: nn.Module, name: str) -> None:
    """Refuses a network whose state is more than tensors: weights files hold no more, and nothing else can be cut."""
    for key, value in network.state_dict().items():
        if not isinstance(value, Tensor):
            module = key.removesuffix("_extra_state").rstrip(".") or "the network itself"
            raise BadInput(
                f"--model {name}: {module} keeps a state that is no tensor (get_extra_state), which no weights file "
                "holds; build it without"
            )


def _check_single(network: nn.Module, data: ImageData, name: str) -> None:
    """Refuses a network that takes several images but not one, which is what the engine will be given."""
    advice = "a squeeze() that names no dimension takes the batch's away (use flatten(1)); or set --batch"
    try:
        with torch.no_grad():
            outputs = network(torch.zeros(1, *data.input_shape))
    except Exception as error:
        raise BadInput(f"--model {name}: fails on a single image ({first_line(error)}); {advice}") from error
    try:
        task_of(data).check(outputs, data, f"{name} on a single image")
    except BadInput as error:
        raise BadInput(f"{error}; {advice}") from None


def check_outputs(network: nn.Module, data: ImageData, name: str, batch: int) -> None:
    """Refuses a network whose outputs are not those of the data's task, in evaluation or in training."""
    network.eval()
    images = torch.zeros(2, *data.input_shape)
    try:
        with torch.no_grad():
            outputs = network(images)
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        wanted = re.search(r"expected input\[.*\] to have (\d+) channels, but got 3 channels", str(error))
        advice = "check the input size (input_size in the configuration)"
        if wanted is not None:
            channels = wanted[1]
            advice = (
                f"its first convolution takes {channels} channel{'s' * (channels != '1')}; images are RGB, grey ones "
                "repeated: build it for three"
            )
        raise BadInput(
            f"--model {name}: fails on images of {data.input_shape} from {data.name} ({first}); {advice}"
        ) from error
    _check_repeats(network, data, name)
    task = task_of(data)
    task.check(outputs, data, name)
    if batch == 1:
        _check_single(network, data, name)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=()):  # dropout draws, and the seed's numbers are the run's
            outputs = copy.deepcopy(network).train()(images)
    except Exception:  # two black images are no batch to train on: only outputs that there are can be wrong
        return
    try:
        task.check(outputs, data, f"{name} in training mode")
    except BadInput as error:
        raise BadInput(
            f"{error}, or build it without auxiliary classifiers (torchvision's: aux_logits=False)"
        ) from None
