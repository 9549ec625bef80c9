"""Data sets: named ones (each one file in this package that calls `register`), image folders, and the user's own.

Data sets are looked for in `$PASSDEPLOY_DATA`, the user's cache folder and where the system puts them, so a run
finds them from any working directory.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Callable
from pathlib import Path

from passdeploy.data.ahead import batches
from passdeploy.data.base import Augmentation, ImageData, Preprocess, Split, resized
from passdeploy.errors import BadInput, nearest
from passdeploy.plugins import load_attribute, users_code
from passdeploy.user_cache import user_cache

__all__ = ["Augmentation", "ImageData", "Preprocess", "Split", "batches", "known", "load", "register", "search_path"]

_REGISTRY: dict[str, Callable[[], ImageData]] = {}


def register(name: str) -> Callable[[Callable[[], ImageData]], Callable[[], ImageData]]:
    """Registers a factory of a named data set."""

    def add(factory: Callable[[], ImageData]) -> Callable[[], ImageData]:
        _REGISTRY[name] = factory
        return factory

    return add


def known() -> list[str]:
    """Names of the registered data sets."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return sorted(_REGISTRY)


def cache_dir() -> Path:
    """The user's cache folder for data (not created)."""
    return user_cache() / "data"


def search_path() -> list[Path]:
    """Folders that are looked through for data sets, first match wins."""
    given = os.environ.get("PASSDEPLOY_DATA", "").split(os.pathsep)
    return [*(Path(p) for p in given if p), cache_dir(), Path("/usr/share/datasets")]


def load(
    name: str,
    *,
    size: tuple[int, int] | None = None,
    mean: tuple[float, float, float] | None = None,
    std: tuple[float, float, float] | None = None,
) -> ImageData:
    """Loads a data set.

    Args:
        name: A registered name, a folder of images, or ``module:function`` returning an `ImageData`.
        size: (H, W) of the images, for named sets and image folders; None: the set's own, or inferred.
        mean: Of the normalisation, on [0, 1] RGB, for image folders; None: inferred.
        std: Likewise.

    Raises:
        BadInput: It is not known or can't be read.
    """
    if name in known():
        data = _REGISTRY[name]()
        return data if size is None else resized(data, size)
    if Path(name).is_dir():
        from passdeploy.data.folder import load_folder

        return load_folder(Path(name), size=size, mean=mean, std=std)
    if ":" in name:
        function = load_attribute(name, "--data")
        with users_code(f"--data {name}: loading it"):
            data = function()
        if not isinstance(data, ImageData):
            raise BadInput(f"--data {name}: returned {type(data).__name__}, expected passdeploy.data.ImageData")
        return data
    raise BadInput(f"--data {name}: no such data set or folder{nearest(name, known())}")
