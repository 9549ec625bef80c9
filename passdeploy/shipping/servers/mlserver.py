"""MLServer model folders: a custom runtime over our runner.

REPOSITORY/settings.json, and for each model
REPOSITORY/NAME/model-settings.json  passdeploy_runtime.py  bundle/  runner/
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from passdeploy.shipping.contents import Contents
from passdeploy.shipping.servers.vendor import SERVED, checked_with, copy_runner
from passdeploy.shipping.sums import Refused

SETTINGS = "settings.json"
MODEL_SETTINGS = "model-settings.json"


def write_settings(folder: Path) -> None:
    """Writes the server's settings unless there are some: in one process, which the runner's threads make full use of.

    MLServer 1.7.1's worker processes die at the start beside uvloop 0.22, too.
    """
    if not (folder / SETTINGS).exists():
        (folder / SETTINGS).write_text(json.dumps({"parallel_workers": 0}) + "\n")


def write_model(
    folder: Path, contents: Contents, name: str, *, engine: str | None = None, key: Path | None = None
) -> None:
    """Writes one model's folder.

    Args:
        folder: The model's, empty.
        contents: The bundle.
        name: The model's.
        engine: Id or target of the engine; None: chosen where it is loaded.
        key: Public key that the server checks the signature with.

    Raises:
        Refused: The bundle has no such engine.
    """
    chosen = [e for e in contents.engines if engine in (None, e.id, e.target)]
    if not chosen:
        raise Refused("the bundle holds no such engine for MLServer")
    contents.sealed.copy(folder / "bundle")
    shutil.copyfile(Path(__file__).with_name("mlserver_model.py"), folder / "passdeploy_runtime.py")
    # All models of a repository run in one process, which imports the first one's runner: it has to know all backends.
    copy_runner(folder / "runner", {*SERVED, *(e.backend for e in chosen)})
    shape, output = list(contents.input_shape), list(contents.output_shape)
    settings = {
        "name": name,
        "implementation": "passdeploy_runtime.PassdeployRuntime",
        "inputs": [{"name": contents.manifest["input"]["name"], "datatype": "FP32", "shape": [-1, *shape]}],
        "outputs": [{"name": contents.manifest["output"]["name"], "datatype": "FP32", "shape": [-1, *output]}],
        # No version: MLServer would keep the old bundle beside a new one, and answer by the larger of the two names.
        "parameters": {"extra": ({} if engine is None else {"engine": chosen[0].id}) | checked_with(folder, key)},
    }
    (folder / MODEL_SETTINGS).write_text(json.dumps(settings, indent=1) + "\n")
