"""The Python API: the same as the command line, with the caller's own objects."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from passdeploy.config import DEFAULT_FILE, DEMO, RunConfig, make_config, merge
from passdeploy.config_file import load_file
from passdeploy.errors import BadInput
from passdeploy.shipping.sums import SUMS
from passdeploy.workspace import is_run_directory, read_json

if TYPE_CHECKING:
    from torch import nn

    from passdeploy.data.base import ImageData
    from passdeploy.pipeline import Run as PipelineRun
    from passdeploy.reporting.schema import Report


def configure(file: Path | None, flags: dict[str, Any], needs_data: bool = True) -> tuple[RunConfig, str | None]:
    """Combines a YAML file (default ``./passdeploy.yaml``) and flags, which win.

    Returns:
        The configuration, and a sentence for the user when something was chosen for them.
    """
    values: dict[str, Any] = {}
    note = None
    if file is not None:
        values = load_file(file)
        origin = f"--config {file}"
    elif Path(DEFAULT_FILE).is_file():
        file, origin = Path(DEFAULT_FILE), DEFAULT_FILE
        values = load_file(file)
        note = f"Configuration: ./{DEFAULT_FILE}"
    else:
        origin = "command line"
    merged = merge(values, flags)
    if not merged.get("model") and not merged.get("data"):
        merged = merge(merged, DEMO)
        missing = "No model, data or configuration file given"
        if file is not None:
            missing = f"{origin} names neither model nor data"
        note = f"{missing}: the embedded demo is used ({DEMO['model']}, {DEMO['data']})."
    for key in ("model", "data"):
        if not merged.get(key) and (key == "model" or needs_data):
            other = "data" if key == "model" else "model"
            raise BadInput(f"--{key} is missing: --{other} is given alone; give both, or neither for the demo")
    return make_config(merged, origin, flags), note


def refuse_macs(config: RunConfig) -> None:
    """A run is about latency. Raises `BadInput` when its configuration counts multiply-accumulates."""
    if config.axis == "macs":
        raise BadInput("axis macs: is for passdeploy compare --axis macs; a run meets a latency, so leave axis out")


def run(
    *,
    model: str | nn.Module | Callable[..., nn.Module],
    data: str | Path | ImageData,
    target: str = "cpu",
    latency: str | list[str] = "2x",
    out: str | Path = "runs/latest",
    fresh: bool = False,
    quiet: bool = False,
    **settings: Any,
) -> Report | list[Report]:
    """Makes a network meet a latency.

    Args:
        model: A name, a factory, or a network (then its weights count as trained).
        data: A name, a folder of images, or an `ImageData`.
        target: Named hardware.
        latency: ``5ms``, ``2x``; several give several reports.
        out: Run directory.
        fresh: Delete what an earlier run left in `out`.
        quiet: Show no progress.
        **settings: Any other key of the configuration (`passdeploy.config.RunConfig`).

    Returns:
        The report, or one per budget.

    Raises:
        PassdeployError: What was given can't be used; one line says what.
    """
    from passdeploy.console import Ui
    from passdeploy.data.base import ImageData
    from passdeploy.pipeline import Run

    model_object = None if isinstance(model, str) else model
    data_object = data if isinstance(data, ImageData) else None
    named = model if isinstance(model, str) else f"<{getattr(model, '__qualname__', type(model).__name__)}>"
    values = {
        "model": named,
        "data": f"<{data_object.name}>" if data_object else str(data),
        "target": target,
        "latency": latency,
        **settings,
    }
    config = make_config(values, "passdeploy.run")
    refuse_macs(config)
    reports = Run(config, Path(out), Ui(quiet), model=model_object, data=data_object, fresh=fresh).run()
    return reports[0] if len(reports) == 1 else reports


def run_stage(
    name: str,
    out: Path,
    *,
    model: str | None = None,
    data: str | None = None,
    quiet: bool = False,
    masked: bool = False,
) -> list[Path]:
    """Runs one stage over an existing run directory, and those before it that are not finished.

    Args:
        name: Of the stage.
        out: The run directory.
        model: The factory of the caller's own model, ``module:function``, when the run's is not a named one.
        data: Likewise of the data: a name found in a run directory is never imported. Of a run that was given an
            `ImageData`: whatever `passdeploy.data.load` makes the same data of.
        quiet: Show no progress.
        masked: With ``compile``: the masked network too, as it is.

    Returns:
        The stage's folders, one per budget for the stages that come after the search.

    Raises:
        BadInput: `out` is no run directory, or `model` or `data` is not what it was made from.
        PassdeployError: What earlier stages found leaves nothing to do for this one.
    """
    from passdeploy.console import Ui
    from passdeploy.dependencies import SHARED_STAGES
    from passdeploy.pipeline import Run

    path = out / "config.yaml"
    if not path.is_file():
        todo = f"start one with passdeploy run --out {out}"
        if (out / SUMS).is_file():
            todo = f"it is a bundle, which passdeploy ship {out} --server puts into a server's model repository"
        elif is_run_directory(out.resolve().parent):  # which holds a folder for each of several budgets, and stages
            todo = f"did you mean the run that it is part of, {out.parent}?"
        raise BadInput(f"--out {out}: is not a run directory (no config.yaml); {todo}")
    values = load_file(path)
    given = {key: value for key, value in (("model", model), ("data", data)) if value is not None}
    for key in ("model", "data"):
        named = str(values.get(key, ""))
        folder = key == "data" and Path(named).is_dir()  # which may well have a colon in its name
        if key not in given and (named.startswith("<") or (":" in named and not folder)):
            what = "module:function" if named.startswith("<") else named
            raise BadInput(f"--out {out}: its {key} is the caller's own; give it again with --{key} {what}")
    # What was given as an object stays as it is in the configuration; what is given now has to be the same.
    objects = {key: values[key] for key in ("model", "data") if str(values.get(key, "")).startswith("<")}
    config = make_config(values | given | objects, str(path))
    images = None
    if "data" in objects:
        from passdeploy import data as datasets

        assert data is not None
        images = datasets.load(data)
    if "model" in objects:
        assert model is not None
        running = _own_model_again(config, out, model, images, quiet)
    else:
        running = Run(config, out, Ui(quiet), data=images)
    if images is not None:
        record = running.space.record("dense")
        if record is None:
            raise BadInput(f"--out {out}: its first stage is not finished; call passdeploy.run with its data again")
        if running.inputs("dense")["data"] != record["inputs"]["data"]:
            raise BadInput(f"--data {data}: is not the data that {out} was made with")
    budgets = running.run_until(name)
    if name in SHARED_STAGES:
        return [running.space.folder(name)]
    if masked:
        from passdeploy.locking import exclusive
        from passdeploy.masked import compile_masked

        with exclusive(out):
            return [compile_masked(running, budget) for budget in budgets]
    return [budget.space.folder(name) for budget in budgets]


def _own_model_again(config: RunConfig, out: Path, model: str, images: ImageData | None, quiet: bool) -> PipelineRun:
    """A run that was started from Python with a factory or a network, with that network's factory given by name."""
    from passdeploy import models
    from passdeploy.console import Ui
    from passdeploy.pipeline import Run
    from passdeploy.weights import load_weights
    from passdeploy.workspace import Workspace

    given: nn.Module | Callable[..., nn.Module] = models.factory(model)
    record = Workspace(out).record("dense")
    if record is None:
        raise BadInput(f"--out {out}: its first stage is not finished; call passdeploy.run with its model again")
    running = Run(config, out, Ui(quiet), model=given, data=images)
    if running.subject.weights is None and "epochs" not in record["inputs"]:
        # The run was given a network, whose weights counted as trained: the first stage has kept them.
        network = running.subject.build()
        load_weights(network, out / "dense" / "dense.safetensors")
        running = Run(config, out, Ui(quiet), model=network, data=images)
    if running.inputs("dense")["network"] != record["inputs"]["network"]:
        raise BadInput(f"--model {model}: is not the network that {out} was made from")
    return running


def save_profile(
    config: RunConfig, out: Path, save: Path, *, fresh: bool = False, quiet: bool = False
) -> dict[str, Any]:
    """Measures the latency model of a target and writes it as a portable file; nothing is trained for that.

    Args:
        config: Names the network, the data and the target.
        out: Run directory in which it is measured; started again it goes on where it was.
        save: The file.
        fresh: Delete what an earlier call left in `out`.
        quiet: Show no progress.

    Returns:
        The model's summary: number of structures, errors, repeatability.

    Raises:
        BadInput: The target can't be measured here, or the file can't be written.
    """
    from passdeploy.console import Ui
    from passdeploy.pipeline import Run
    from passdeploy.stages.profile import stage_model
    from passdeploy.workspace import copy_file

    if save.resolve().is_relative_to(out.resolve()):
        raise BadInput(f"--save {save}: lies in --out {out}, which --fresh would delete; give a file outside of it")
    try:  # neither what takes minutes to measure nor what --fresh deletes may be lost for a mistyped path
        save.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=save.parent):
            pass
    except OSError as error:
        raise BadInput(f"--save {save}: cannot be written ({error.strerror}); choose another file") from None
    if save.is_dir():
        raise BadInput(f"--save {save}: is a folder; give a file")
    # A file that a run reads its latency model from may well be the one that is to be written.
    config = config.model_copy(update={"profile_file": None, "axis": "latency"})
    if config.profile.cache == "use":
        config = config.model_copy(update={"profile": config.profile.model_copy(update={"cache": "refresh"})})
    running = Run(config, out, Ui(quiet), fresh=fresh, latency_only=True)
    if not running.measured:
        raise BadInput(
            f"--target {config.target}: nothing can be measured here ({running.unmeasurable}); run this where it can"
        )
    running.shared("profile")
    copy_file(running.space.folder("profile") / "profile.json", save)
    return stage_model(running).summary()


def _graph_shapes(path: Path) -> tuple[int, tuple[int, int]]:
    """Classes and image size (H, W) of an exported network.

    Raises:
        BadInput: The file is missing or is no graph.
    """
    import onnx

    try:
        graph = onnx.load(path, load_external_data=False).graph
        images, logits = (
            [d.dim_value for d in v.type.tensor_type.shape.dim] for v in (graph.input[0], graph.output[0])
        )
        return logits[1], (images[2], images[3])
    except Exception as error:
        raise BadInput(f"{path}: cannot be read ({type(error).__name__}); give the folder of a finished run") from None


def load(out: str | Path, *, model: str | nn.Module | Callable[..., nn.Module] | None = None) -> nn.Module:
    """Loads the fine-tuned thin network of a run, without its input stage.

    Args:
        out: The run directory (or the folder of one budget in it).
        model: The dense architecture: a name, a factory, or a network; None: the name in the run's configuration.

    Returns:
        The thin network in eval mode: normalised images (N, 3, H, W) -> logits.

    Raises:
        BadInput: The folder holds no finished run, or `model` is of another architecture or can't be copied.
    """
    from torch import nn

    from passdeploy import models
    from passdeploy.groups.wrapped import copied
    from passdeploy.surgery import apply_architecture
    from passdeploy.weights import load_weights

    out = Path(out)
    for name in ("architecture.json", "model.safetensors"):
        if not (out / name).is_file():
            raise BadInput(f"{out}: has no {name}; give the folder of a finished run (or of one of its budgets)")
    if isinstance(model, nn.Module):
        network = copied(model)
    else:
        chosen = model
        if chosen is None:
            folder = out if (out / "config.yaml").is_file() else out.parent
            named = str(load_file(folder / "config.yaml").get("model"))
            if ":" in named or named.startswith("<"):
                raise BadInput(
                    f"{out}: its model is the user's own ({named}); give its factory: load(dir, model=build)"
                )
            chosen = named
        classes, size = _graph_shapes(out / "model.onnx")
        network = models.build(chosen, classes, size)
    thin = apply_architecture(network, read_json(out / "architecture.json"))
    load_weights(thin, out / "model.safetensors")
    return thin.train().eval()  # some modules forget in train mode what they worked out from other weights
