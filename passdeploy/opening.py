"""Whether a run may work in a folder: never in one of another configuration; ``--fresh`` deletes what runs wrote."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from passdeploy.budget import parse_budget
from passdeploy.config import RunConfig, differing_keys, make_config
from passdeploy.config_file import load_file
from passdeploy.dependencies import BUDGET_STAGES, NOT_INPUTS, SHARED_STAGES
from passdeploy.errors import BadInput
from passdeploy.final_copies import FILES, FOLDERS
from passdeploy.masked import FOLDER as MASKED
from passdeploy.workspace import CONFIG, MANIFEST, is_run_directory, json_digest

WRITTEN = {
    *SHARED_STAGES,
    *BUDGET_STAGES,
    *FILES,
    *FOLDERS,
    *(f"{name}.old" for name in FOLDERS),  # of a kill while one was replaced
    CONFIG,
    MANIFEST,
    MASKED,
    "dense.onnx",
}
"""What runs call what they leave in a run directory, or in the folder of a budget."""


def refuse_other(config: RunConfig, root: Path) -> None:
    """Refuses a run directory of another configuration, saying which keys differ, and a folder of something else.

    Args:
        config: Of the run that is to work there.
        root: The run directory.

    Raises:
        BadInput: It is one of these.
    """
    path = root / CONFIG
    if not path.exists():
        # Hidden files are ours: what a kill before the first file was complete has left.
        if any(not child.name.startswith(".") for child in root.iterdir()):
            raise BadInput(f"--out {root}: not empty and not a run directory; give another folder")
        return
    # Before --fresh is recommended: it deletes the folder.
    if not is_run_directory(root):
        raise BadInput(
            f"--out {root}: is not a run directory, since its {CONFIG} is something else's; give another folder"
        )
    try:
        recorded = make_config(load_file(path))  # keys that a later version added stand at their defaults
    except BadInput:
        raise BadInput(f"{path}: can no longer be read as a configuration; add --fresh to start over") from None
    theirs, mine, defaults = (_computed(each.to_json()) for each in (recorded, config, RunConfig()))
    different = differing_keys(theirs, mine)
    if different:
        chosen = set(different) & set(differing_keys(defaults, mine))
        hint = "a default may have changed with the version: put the old value into the configuration to go on; "
        raise BadInput(
            f"--out {root}: holds a run of another configuration (differs in: {', '.join(different)}); "
            f"{'' if chosen else hint}give another --out, or --fresh to delete it"
        )


def _computed(keys: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in keys.items() if key not in NOT_INPUTS}


def free_folder(config: RunConfig, root: Path) -> Path:
    """Where one of many runs works: what runs of other configurations left stays as it is.

    Args:
        config: Of the run.
        root: The usual folder.

    Returns:
        It, or the one beside it that is this configuration's alone where `refuse_other` would refuse it.
    """
    try:
        if root.is_dir():
            refuse_other(config, root)
    except BadInput:
        return root.with_name(f"{root.name}-{json_digest(_computed(config.to_json()))[:12]}")
    return root


def refuse_loss(config: RunConfig, root: Path) -> None:
    """Refuses to clear a run directory in which something lies that no run would make again.

    Args:
        config: Of the run that is to start there.
        root: The run directory.

    Raises:
        BadInput: The run reads a file in it, or it holds something that no run wrote.
    """
    given = {"--weights": config.weights, "--profile": config.profile_file, "--data": config.data}
    for flag, name in given.items():
        if name is not None and Path(name).exists() and Path(name).resolve().is_relative_to(root.resolve()):
            raise BadInput(
                f"{flag} {name}: lies in --out {root}, which --fresh would delete; move it or give another --out"
            )
    strangers = sorted(_strangers(root)) if is_run_directory(root) else []
    if strangers:
        shown = ", ".join(strangers[:5]) + (f" and {len(strangers) - 5} more" if len(strangers) > 5 else "")
        raise BadInput(
            f"--out {root}: holds what no run wrote and --fresh would delete: {shown}; move it or give another --out"
        )


def _strangers(root: Path) -> Iterator[str]:
    """What no run wrote, by its path in the run directory; hidden files are taken for a run's."""
    for path in root.iterdir():
        if path.is_dir() and _is_budget(path.name):
            yield from (f"{path.name}/{name}" for name in _strangers(path))
        elif path.name not in WRITTEN and not path.name.startswith("."):
            yield path.name


def _is_budget(name: str) -> bool:
    try:
        return parse_budget(name).asked == name
    except BadInput:
        return False
