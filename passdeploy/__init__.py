"""passdeploy: makes a trained vision network meet a latency on real hardware, and proves each step on the way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from passdeploy.api import load as load
    from passdeploy.api import run as run
    from passdeploy.data.base import ImageData as ImageData

    __version__: str

_HOME = {"run": "passdeploy.api", "load": "passdeploy.api", "ImageData": "passdeploy.data.base"}
__all__ = ["ImageData", "load", "run"]


def __getattr__(name: str) -> Any:
    """Imports torch only when something that needs it is used."""
    if name == "__version__":
        from importlib import metadata

        try:
            return metadata.version("passdeploy")
        except metadata.PackageNotFoundError:
            return "0+unknown"
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)
