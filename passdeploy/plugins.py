"""Loads what the user names as ``module:function`` on the command line (never a name found in a file of a run)."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from passdeploy.errors import BadInput


def load_attribute(spec: str, flag: str) -> Callable[..., Any]:
    """Imports ``module:function`` from the path or the working directory.

    Raises:
        BadInput: No such module or function, or it can't be called.
    """
    module_name, _, attribute = spec.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise BadInput(f"{flag} {spec}: no module {module_name!r} on the path or in {here}") from None
        raise BadInput(f"{flag} {spec}: {module_name} needs {error.name!r}, which is not installed") from error
    except Exception as error:
        raise BadInput(f"{flag} {spec}: importing {module_name} failed: {type(error).__name__}: {error}") from error
    value: Any = module
    for part in attribute.split("."):
        value = getattr(value, part, None)
    if not callable(value):
        raise BadInput(f"{flag} {spec}: {module_name} has no function {attribute!r}")
    return value  # type: ignore[no-any-return]
