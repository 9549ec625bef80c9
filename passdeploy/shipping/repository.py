"""`passdeploy ship RUN --server triton|mlserver|kserve`: a folder that an inference server loads as it is."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from passdeploy.errors import BadInput, nearest
from passdeploy.huge_pages import ASK
from passdeploy.shipping.contents import Contents, EngineInfo, open_bundle
from passdeploy.shipping.packages import packages
from passdeploy.shipping.replace import replace_folder
from passdeploy.shipping.servers import kserve, mlserver, triton
from passdeploy.shipping.sums import SUMS

SERVERS = ("triton", "mlserver", "kserve")

STAGE = "stage.json"
"""Lies in a stage's folder (`passdeploy.workspace.RECORD`, which needs more packages than this does)."""


@dataclass(frozen=True)
class Repository:
    """What was written.

    Attributes:
        folder: The repository.
        model: Name of the model in it.
        kind: How it is served: ``python``, ``onnxruntime``, ``tensorrt`` or ``mlserver``.
        start: The command that serves it.
        note: What is left to do; None when nothing is.
    """

    folder: Path
    model: str
    kind: str
    start: str
    note: str | None = None


def find_bundle(path: Path) -> Path:
    """The bundle at `path`, or the one of the run at `path`.

    Raises:
        BadInput: None there, or several (a run with several budgets).
    """
    path = Path(path)
    for candidate in (path, path / "bundle"):
        if _is_bundle(candidate):
            return candidate
    # What lies in a stage's folder is the run's own, and may be of a state that the run has left since.
    found = [sums.parent.parent for sums in path.glob(f"*/bundle/{SUMS}")]
    several = sorted(folder for folder in found if not (folder / STAGE).is_file())
    if len(several) == 1:
        return several[0] / "bundle"
    if several:
        raise BadInput(f"{path}: holds several bundles; give one of {', '.join(map(str, several))}")
    raise BadInput(f"{path}: neither a bundle nor a run that has one; passdeploy run writes one")


def _is_bundle(folder: Path) -> bool:
    try:
        return (folder / SUMS).is_file()
    except OSError:  # it may not be looked at
        return False


def model_name(name: str) -> str:
    """A name that servers and file systems take."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name).strip("_-") or "model"


def write_repository(
    folder: Path,
    source: Path,
    server: str,
    *,
    name: str | None = None,
    kind: str = "auto",
    instances: int = 1,
    engine: str | None = None,
    key: Path | None = None,
    storage_uri: str | None = None,
) -> Repository:
    """Writes a bundle into a server's model repository; a model of the same name there is replaced in one step.

    Args:
        folder: The repository; other models in it are left alone.
        source: A bundle, or a run that has one.
        server: One of `SERVERS`.
        name: Of the model; None: the bundle's.
        kind: Triton's and KServe's: ``auto``, ``python``, ``onnxruntime`` or ``tensorrt``.
        instances: Of the model, per device (Triton).
        engine: Id or target of the engine to serve; None: the first that fits where it is loaded.
        key: Public key: the bundle must be signed with its private half.
        storage_uri: Where KServe will find the repository.

    Raises:
        BadInput: No such bundle, server or kind; a folder that can't be written; something else than a model in the
            model's place.
        Refused: The bundle is not what was sealed, or has nothing that this server can load.
    """
    if server not in SERVERS:
        raise BadInput(f"--server {server}: no such server{nearest(server, SERVERS)}")
    if instances < 1:
        raise BadInput(f"--instances {instances}: must be at least 1")
    contents = open_bundle(find_bundle(source), key)
    name = model_name(name or contents.manifest["name"])
    own = triton.served_by_onnxruntime(contents, engine)
    chosen = [e for e in contents.engines if engine in (None, e.id, e.target)] if own is None else [own]
    measured_so = {entry["id"] for entry in contents.manifest["engines"] if entry.get("huge_pages")}
    huge = any(each.id in measured_so for each in chosen)
    folder = Path(folder)
    if folder.resolve().is_relative_to(contents.sealed.folder.resolve()):
        raise BadInput(f"{folder}: is the bundle itself or lies in it; give another folder for the repository")
    if (folder / SUMS).exists():
        raise BadInput(f"{folder}: is a bundle itself; give another folder for the repository")
    if server == "kserve" and (other := _other_model(folder, name)):
        raise BadInput(
            f"{folder}: holds the model {other} already, and KServe loads all of a repository into one server; give "
            "another --out"
        )
    place = folder / name
    if not _replaceable(place):
        raise BadInput(f"{place}: exists and is no model; give another --name or --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Beside the repository, not in it: a polling server must not find a half-written model.
        near = folder.resolve().parent
        if near.stat().st_dev != folder.stat().st_dev:  # a mounted volume: a move out of it would be no single step
            near = folder
        prefix = f".{folder.name}."
        try:
            work = Path(tempfile.mkdtemp(dir=near, prefix=prefix))
        except OSError:  # the folder may be ours where the one that holds it is not: /models of a container
            work = Path(tempfile.mkdtemp(dir=folder, prefix=prefix))
        try:
            staged = work / name
            staged.mkdir(mode=0o755)
            if server == "mlserver":
                mlserver.write_model(staged, contents, name, engine=engine, key=key)
                used = "mlserver"
            else:
                wanted = "onnxruntime" if server == "kserve" and kind == "auto" and _plain(contents) else kind
                used = triton.write_model(
                    staged, contents, name, kind=wanted, instances=instances, engine=engine, key=key
                )
            replace_folder(staged, place)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        if server == "mlserver":
            mlserver.write_settings(folder)
        if server == "kserve":
            gpu = "KIND_GPU" in (place / triton.CONFIG).read_text(encoding="utf-8")
            cpus = instances * (chosen[0].threads if chosen else 1)
            kserve.write_service(
                folder,
                contents,
                name,
                gpu=gpu,
                cpus=cpus,
                instances=instances,
                storage_uri=storage_uri,
                huge_pages=huge,
            )
    except OSError as error:
        raise BadInput(
            f"{error.filename or folder}: the repository cannot be written ({error.strerror or error})"
        ) from None
    replaced = chosen[0] if own is None and chosen and chosen[0].precision != "fp32" else None
    unchecked = own if used == "onnxruntime" else None
    told = _described(folder, name, used, server, contents, storage_uri, replaced, unchecked, key)
    # For KServe it stands in the service.
    return replace(told, start=f"{ASK} {told.start}") if huge and server != "kserve" else told


def _replaceable(place: Path) -> bool:
    """Whether nothing is lost there that a server's model repository does not hold."""
    if not place.is_dir():
        return not os.path.lexists(place)
    return any((place / own).is_file() for own in (triton.CONFIG, mlserver.MODEL_SETTINGS)) or not any(place.iterdir())


def _other_model(folder: Path, name: str) -> str | None:
    found = sorted(config.parent.name for config in folder.glob(f"*/{triton.CONFIG}"))
    return next((other for other in found if other != name), None)


def _plain(contents: Contents) -> bool:
    """Whether the graph goes to Triton's own ONNX Runtime: KServe's stock image has none for its Python."""
    return triton.choose_kind(contents) == "python"


def _described(
    folder: Path,
    name: str,
    kind: str,
    server: str,
    contents: Contents,
    storage_uri: str | None,
    replaced: EngineInfo | None,
    unchecked: EngineInfo | None,
    key: Path | None,
) -> Repository:
    """The note says what is left to do.

    `replaced` is the engine that Triton's ONNX Runtime can't load: it is given the ONNX file instead. `unchecked` is
    the one that it loads without our runner, which would refuse a machine that it is not for.
    """
    note, status = None, contents.manifest["status"]
    needs = "numpy, " + ", ".join(sorted({name for e in contents.engines for name in packages(e)}))
    needs += "" if key is None else ", and model-signing to check the signature"
    if kind == "python":
        note = f"Triton's Python, 3.11 or newer, needs {needs}"
    elif (folder / name / "build").is_dir():
        note = f"serves the ONNX file until {folder / name}/build/build_plan.sh has built the plan on the target GPU"
    elif kind == "onnxruntime" and replaced is not None:
        what = f"{replaced.precision} engine of {replaced.backend}"
        note = f"serves the ONNX file in fp32: Triton's ONNX Runtime loads no {what}"
    elif unchecked is not None and (features := unchecked.requires.get("cpu_features_any")):
        note = (
            f"its {unchecked.precision} sums are right only on a CPU with {' or '.join(features)}, which Triton does "
            "not check"
        )
    if status in ("over_budget", "accuracy_below_floor"):
        note = f"its run ended {status}" + (f"; {note}" if note else "")
    if server == "kserve":
        if storage_uri is None:
            note = (f"{note}; " if note else "") + (
                f"copy {folder} to your storage and put its address for {kserve.PLACEHOLDER} in {kserve.FILE}"
            )
        return Repository(folder, name, kind, f"kubectl apply -f {shlex.quote(str(folder / kserve.FILE))}", note)
    if server == "mlserver":
        note = f"MLServer's Python, 3.11 or newer, needs {needs}" + (f"; {note}" if note else "")
        return Repository(folder, name, kind, f"mlserver start {shlex.quote(str(folder))}", note)
    return Repository(folder, name, kind, f"tritonserver --model-repository={shlex.quote(str(folder))}", note)
