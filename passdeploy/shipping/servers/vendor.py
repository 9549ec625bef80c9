"""Copies the runner's source next to what a server loads, so that the server needs no passdeploy of its own."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import passdeploy
from passdeploy.shipping.sums import Refused

_RUNNER = (
    "errors.py",
    "shipping/contents.py",
    "shipping/hardware.py",
    "shipping/packages.py",
    "shipping/replace.py",
    "shipping/runner.py",
    "shipping/signing.py",
    "shipping/sums.py",
    "shipping/executors/base.py",
)
_BACKENDS = {
    "onnxruntime": (
        "shipping/executors/onnxruntime.py",
        "engines/onnxruntime.py",
        "engines/base.py",
        "engines/_common.py",
    ),
    "openvino": ("shipping/executors/openvino.py",),
    **dict.fromkeys(
        ("tensorrt", "tensorrt_rtx"),
        ("shipping/executors/tensorrt.py", "engines/_cuda.py", "engines/_trt_context.py", "kernels/interface.py"),
    ),
}
SERVED = tuple(_BACKENDS)
"""Backends whose engines run without torch and the rest of passdeploy."""

VERIFY_KEY = "verify_key.pem"
"""The public key beside a served bundle, whose signature is checked again where it is loaded."""


def checked_with(folder: Path, key: Path | None) -> dict[str, str]:
    """Copies the public key, if there is one, beside the bundle in `folder`; the parameter that names it."""
    if key is None:
        return {}
    shutil.copyfile(key, folder / VERIFY_KEY)
    return {"verify_key": VERIFY_KEY}


def copy_runner(folder: Path, backends: Iterable[str]) -> None:
    """Writes `folder`/passdeploy with what `passdeploy.shipping.runner` needs for these backends.

    Raises:
        Refused: A backend whose engines need all of passdeploy (and torch) to run.
    """
    files = set(_RUNNER)
    for backend in backends:
        if backend not in _BACKENDS:
            raise Refused(
                f"backend {backend}: its engines need torch and the whole of passdeploy, a server's Python can't carry "
                f"them along; ship an engine of {', '.join(_BACKENDS)}, or --kind onnxruntime"
            )
        files |= set(_BACKENDS[backend])
    source = Path(passdeploy.__file__).parent
    for name in sorted(files):
        target = folder / "passdeploy" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target)
        for package in (target.parent, target.parent.parent):
            if package.is_relative_to(folder / "passdeploy") and not (package / "__init__.py").exists():
                (package / "__init__.py").write_text('"""The part of passdeploy that runs bundles."""\n')
