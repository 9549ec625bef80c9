"""Final copies of folders that stages made: where the design promises them, whole, and not copied over a signature."""

from __future__ import annotations

import shutil
from pathlib import Path

from passdeploy.errors import BadInput, PassdeployError
from passdeploy.shipping.replace import replace_folder
from passdeploy.shipping.signing import SIGNATURE
from passdeploy.shipping.sums import SUMS, open_sealed, parse
from passdeploy.workspace import sha256


def offer_folder(source: Path, target: Path) -> str | None:
    """Puts a copy of `source` in place of `target` in one step, unless it is there already, signed or not.

    Returns:
        What the user has to know: that a signature is gone with the bundle it was made for.

    Raises:
        BadInput: It can't be written.
    """
    if _contents(source) == _contents(target) or _is_signed_copy(source, target):
        return None
    lost = (target / SIGNATURE).is_file()
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(source, temporary)
        replace_folder(temporary, target)
    except OSError as error:  # shutil.Error, too, which lists the files
        raise BadInput(
            f"{target}: cannot be written ({error.strerror or error}); free some space, then run again: "
            "what was finished is kept"
        ) from None
    return f"{target}: is another bundle now, so its signature is gone; sign it again" if lost else None


def withdraw_folder(target: Path) -> str | None:
    """Removes what is not good any more, and what a kill has left of copying it.

    Returns:
        What the user has to know: that a signature is gone with the bundle it was made for.
    """
    lost = (target / SIGNATURE).is_file()
    for folder in (target, target.with_name(f".{target.name}.tmp")):
        shutil.rmtree(folder, ignore_errors=True)
    return f"{target}: is of an earlier state of the run, so it is gone, and its signature too" if lost else None


def _contents(folder: Path) -> dict[str, str]:
    """Digest of each file, by its relative path."""
    return {path.relative_to(folder).as_posix(): sha256(path) for path in folder.rglob("*") if path.is_file()}


def _is_signed_copy(source: Path, target: Path) -> bool:
    """Whether `target` is a sealed bundle that differs from the bundle `source` in what signing changes, only."""
    from passdeploy.shipping.card import MODEL_CARD, README

    if not (source / SUMS).is_file():
        return False
    try:
        signed = open_sealed(target).sums
    except PassdeployError:
        return False
    if SIGNATURE not in signed:
        return False
    plain = parse((source / SUMS).read_bytes())
    different = {name for name in {*plain, *signed} if plain.get(name) != signed.get(name)}
    return different <= {SIGNATURE, MODEL_CARD, README}
