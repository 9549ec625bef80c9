"""Tasks: what a network's outputs mean, how they are trained and judged. Each task is one file here that registers it.

A data set says which task it is for (`ImageData.task`), or its labels do: one number per image is classification, a
map of numbers per image is segmentation.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

from passdeploy.data.base import label_tensor
from passdeploy.errors import BadInput, nearest
from passdeploy.tasks.base import Metric, Task, register, registered

if TYPE_CHECKING:
    from passdeploy.data.base import ImageData

__all__ = ["Metric", "Task", "get_task", "known", "register", "task_of"]


def known() -> list[str]:
    """Names of all tasks."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return sorted(registered())


def get_task(name: str) -> Task:
    """Raises `BadInput` with the nearest names when there is no such task."""
    if name not in known():
        raise BadInput(f"--task {name}: no such task{nearest(name, known())}")
    return registered()[name]


def task_of(data: ImageData) -> Task:
    """The task of a data set: the one it names, else the one its labels are for.

    Raises:
        BadInput: It names none, and its labels are no tensor, or have a shape that no built-in task has.
    """
    if data.task is not None:
        return get_task(data.task)
    shape = label_tensor(data, "train").shape
    for rank, name in ((1, "classification"), (3, "segmentation")):
        if len(shape) == rank:
            return get_task(name)
    raise BadInput(
        f"--data {data.name}: labels of shape {tuple(shape)} belong to no built-in task; name one in ImageData.task"
    )
