"""Loads what the user names as ``module:function`` on the command line (never a name found in a file of a run)."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from passdeploy.errors import BadInput, PassdeployError, Terminated, nearest


@contextlib.contextmanager
def users_code(where: str, *but: type[Exception]) -> Iterator[None]:
    """A block that calls the user's own code, whose errors are not ours, and which must not end the program.

    Args:
        where: What was given, and what is done with it.
        but: Errors that the caller tells better.

    Raises:
        BadInput: It fails, or calls `sys.exit`.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        if isinstance(error, (PassdeployError, Terminated, *but)):
            raise
        said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        ended = "; put what a script does under if __name__ == '__main__'" if isinstance(error, SystemExit) else ""
        raise BadInput(f"{where} failed: {said}{ended}") from error


def _as_module(file: Path, attribute: str) -> str:
    """How a function in a file is given instead."""
    path = file.resolve().with_suffix("")
    here = Path.cwd()
    parts = path.relative_to(here).parts if path.is_relative_to(here) else ()
    if parts and all(part.isidentifier() for part in parts):
        return f"give {'.'.join(parts)}:{attribute}"
    return f"start in {path.parent} and give {path.name}:{attribute}"


def _imported(name: str) -> ModuleType:
    """Imports a user's module, and what it imports of torchvision also beside a PyTorch that it was not built for."""
    try:
        return importlib.import_module(name)
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    from passdeploy._torchvision import torchvision

    torchvision()
    return importlib.import_module(name)


def load_attribute(spec: str, flag: str) -> Callable[..., Any]:
    """Imports ``module:function`` from the path or the working directory.

    Raises:
        BadInput: No such module or function, or it can't be called.
    """
    module_name, _, attribute = spec.partition(":")
    if "/" in module_name or module_name.endswith(".py"):
        raise BadInput(
            f"{flag} {spec}: {module_name} is a path, not a module; {_as_module(Path(module_name), attribute)}"
        )
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        with users_code(f"{flag} {spec}: importing {module_name}", ModuleNotFoundError):
            module = _imported(module_name)
    except ModuleNotFoundError as error:
        if error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise BadInput(
                f"{flag} {spec}: no module {module_name!r} on the path or in {here}; start where it lies, or put its "
                "folder into PYTHONPATH"
            ) from None
        raise BadInput(
            f"{flag} {spec}: {module_name} needs {error.name!r}, which is not installed in this environment; install it"
        ) from error
    value: Any = module
    for part in attribute.split("."):
        value = getattr(value, part, None)
    if not callable(value):
        functions = [name for name, each in vars(module).items() if callable(each) and not name.startswith("_")]
        raise BadInput(f"{flag} {spec}: {module_name} has no function {attribute!r}{nearest(attribute, functions)}")
    return value  # type: ignore[no-any-return]
