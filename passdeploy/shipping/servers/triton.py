"""Triton model repositories: the Python backend over our runner, ONNX Runtime, or TensorRT plans.

REPOSITORY/NAME/config.pbtxt  labels.txt  warmup/images
                1/model.py  1/bundle/  1/runner/        kind python
                1/model.onnx                            kind onnxruntime
                1/model-sm80.plan                       kind tensorrt
                build/                                  the plan's build script, where only the target can build it
"""

from __future__ import annotations

import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np

from passdeploy.errors import BadInput, nearest
from passdeploy.shipping.contents import Contents, EngineInfo
from passdeploy.shipping.servers.triton_config import TritonConfig, parse, render
from passdeploy.shipping.servers.vendor import checked_with, copy_runner
from passdeploy.shipping.sums import Refused

CONFIG = "config.pbtxt"
KINDS = ("auto", "python", "onnxruntime", "tensorrt")
LARGEST_BATCH = 8
"""Images that Triton may put together for an engine of a smaller batch: one hand-over to the Python process for all."""


def _is_gpu(engine: EngineInfo) -> bool:
    return bool(engine.requires.get("compute_capabilities"))


def choose_kind(contents: Contents) -> str:
    """The kind that serves this bundle best: its plan, else its ONNX on a GPU, else our runner.

    A TensorRT-RTX engine is no TensorRT plan: its bundle is served as ONNX, with a script that builds the plan.
    """
    if any(engine.backend == "tensorrt" for engine in contents.engines):
        return "tensorrt"
    if not contents.engines or all(_is_gpu(engine) for engine in contents.engines):
        return "onnxruntime"
    return "python"


def write_model(
    folder: Path,
    contents: Contents,
    name: str,
    *,
    kind: str = "auto",
    instances: int = 1,
    engine: str | None = None,
    key: Path | None = None,
) -> str:
    """Writes one model of a repository.

    Args:
        folder: The model's, empty.
        contents: The bundle.
        name: The model's.
        kind: One of `KINDS`.
        instances: Per device.
        engine: Id or target of the engine; None: chosen where it is loaded.
        key: Public key that our runner checks the signature with; the other kinds hold no bundle.

    Returns:
        The kind.

    Raises:
        BadInput: No such kind.
        Refused: The bundle has nothing for that kind.
    """
    if kind not in KINDS:
        raise BadInput(f"--kind {kind}: no such kind{nearest(kind, KINDS)}")
    kind = choose_kind(contents) if kind == "auto" else kind
    writer = {"python": _python, "onnxruntime": _onnxruntime, "tensorrt": _tensorrt}[kind]
    (folder / "1").mkdir(parents=True)
    config = writer(folder, contents, name, instances, engine)
    if kind == "python":
        config = replace(config, parameters={**config.parameters, **checked_with(folder / "1", key)})
    _write_config(folder / CONFIG, config)
    labels = "".join(" ".join(label.split()) + "\n" for label in contents.classes)
    (folder / "labels.txt").write_text(labels, encoding="utf-8")
    _write_warmup(folder / "warmup", contents, batched=kind == "python")
    return kind


def _write_config(path: Path, config: TritonConfig) -> None:
    text = render(config)
    parse(text)
    path.write_text(text, encoding="utf-8")


def _write_warmup(folder: Path, contents: Contents, *, batched: bool) -> None:
    """One image where Triton adds the batch itself, else as many as the shape asks for."""
    images, _ = contents.samples()
    count = 1 if batched else max(1, contents.manifest["input"]["shape"][0])
    folder.mkdir()
    (folder / "images").write_bytes(np.resize(images, (count, *images.shape[1:])).tobytes())


def _python(folder: Path, contents: Contents, name: str, instances: int, engine: str | None) -> TritonConfig:
    chosen = [e for e in contents.engines if engine in (None, e.id, e.target)]
    if not chosen:
        raise Refused("the bundle holds no such engine for the Python backend; try --kind onnxruntime")
    contents.sealed.copy(folder / "1" / "bundle")
    shutil.copyfile(Path(__file__).with_name("triton_model.py"), folder / "1" / "model.py")
    copy_runner(folder / "1" / "runner", {e.backend for e in chosen})
    batch = max(e.batch for e in chosen)
    return TritonConfig(
        name=name,
        engine='backend: "python"',
        max_batch=max(LARGEST_BATCH, batch),
        input_name=contents.manifest["input"]["name"],
        input_dims=contents.input_shape,
        output_name=contents.manifest["output"]["name"],
        output_dims=contents.output_shape,
        gpu=all(map(_is_gpu, chosen)),
        instances=instances,
        preferred_batch=batch,
        queue_delay_us=100 if batch > 1 else 0,
        parameters={} if engine is None else {"engine": chosen[0].id},
    )


def _whole_graph(contents: Contents, name: str, instances: int, *, gpu: bool) -> TritonConfig:
    """For backends that take the graph as it is: a fixed batch is part of the shape."""
    ports = contents.manifest["input"], contents.manifest["output"]
    free = ports[0]["shape"][0] < 0
    input_dims, output_dims = ([*port["shape"][1:]] if free else [*port["shape"]] for port in ports)
    return TritonConfig(
        name=name,
        engine='platform: "onnxruntime_onnx"',
        max_batch=LARGEST_BATCH if free else 0,
        input_name=ports[0]["name"],
        input_dims=input_dims,
        output_name=ports[1]["name"],
        output_dims=output_dims,
        gpu=gpu,
        instances=instances,
        queue_delay_us=100,
    )


def served_by_onnxruntime(contents: Contents, engine: str | None) -> EngineInfo | None:
    """The engine that Triton's ONNX Runtime loads as it is on a CPU; None: it gets the ONNX file, in fp32."""
    chosen = (e for e in contents.engines if engine in (None, e.id, e.target))
    return next((e for e in chosen if e.backend == "onnxruntime" and not _is_gpu(e)), None)


def _onnxruntime(folder: Path, contents: Contents, name: str, instances: int, engine: str | None) -> TritonConfig:
    own = served_by_onnxruntime(contents, engine)
    file = own.file if own is not None else contents.manifest["parts"]["onnx"]["file"]
    (folder / "1" / "model.onnx").write_bytes(contents.sealed.read(file))
    chosen = [own] if own is not None else [e for e in contents.engines if engine in (None, e.id, e.target)]
    on_gpu = [e for e in chosen if _is_gpu(e)]
    gpu = bool(on_gpu) and len(on_gpu) == len(chosen)
    config = _whole_graph(contents, name, instances, gpu=gpu)
    if gpu:
        write_build_script(folder, contents, config, on_gpu[0])
        return config
    threads = str(chosen[0].threads if chosen else 1)
    return replace(config, parameters={"intra_op_thread_count": threads, "inter_op_thread_count": "1"})


def _tensorrt(folder: Path, contents: Contents, name: str, instances: int, engine: str | None) -> TritonConfig:
    plans: dict[str, str] = {}
    largest = LARGEST_BATCH  # of a graph whose batch is free: as far as each plan's profile goes
    for entry in contents.engines:
        # What is TensorRT-RTX is no TensorRT plan, whatever its file is called.
        if entry.backend != "tensorrt" or engine not in (None, entry.id, entry.target):
            continue
        for capability in entry.requires.get("compute_capabilities", ()):
            file = f"model-sm{capability.replace('.', '')}.plan"
            if capability not in plans:
                if entry.requires.get("or_newer"):  # what Triton takes for a GPU that is not listed
                    (folder / "1" / "model.plan").write_bytes(contents.sealed.read(entry.file))
                (folder / "1" / file).write_bytes(contents.sealed.read(entry.file))
                plans[capability] = file
                largest = min(largest, entry.meta.get("max_batch") or entry.batch)
    if not plans:
        raise Refused(
            "the bundle holds no plan of the full TensorRT; use --kind onnxruntime, which brings its build script"
        )
    config = _whole_graph(contents, name, instances, gpu=True)
    largest = min(largest, config.max_batch)
    return replace(config, engine='platform: "tensorrt_plan"', max_batch=largest, plans=plans, cuda_graphs=True)


BUILD = """#!/bin/sh
# Builds the TensorRT plan of this model on the GPU that will serve it (nothing else may use the GPU meanwhile), and
# makes Triton serve the plan instead of the ONNX file. Run it inside the Triton container of the version that serves:
#   docker run --rm --gpus 1 -v REPOSITORY:/models nvcr.io/nvidia/tritonserver:VERSION-py3 \\
#     sh /models/NAME/build/build_plan.sh
{note}set -eu
cd "$(dirname "$0")/.."
trtexec=$(command -v trtexec || echo /usr/src/tensorrt/bin/trtexec)
[ -x "$trtexec" ] || {{ echo "trtexec: not found; run this inside the Triton or TensorRT container" >&2; exit 2; }}
# The precision stands in the graph; TensorRT 10 has to be told to keep to it, later ones do.
typed=$("$trtexec" --help 2>&1 | grep -q -- --stronglyTyped && echo --stronglyTyped || true)
"$trtexec" --onnx=build/{onnx} --saveEngine=1/model.plan.part{shapes} $typed --noTF32 --useCudaGraph
mv 1/model.plan.part 1/model.plan
cp build/config.tensorrt.pbtxt config.pbtxt
echo "1/model.plan: built; load the model again"
"""


def _shapes(config: TritonConfig, batch: int) -> str:
    """What trtexec has to be told of a graph whose batch is free: from one image to what Triton puts together."""
    batches = {"min": 1, "opt": min(batch, config.max_batch), "max": config.max_batch}
    dims = "x".join(map(str, config.input_dims))
    shapes = (f" --{which}Shapes={shlex.quote(f'{config.input_name}:{n}x{dims}')}" for which, n in batches.items())
    return "".join(shapes) if config.max_batch else ""


def write_build_script(folder: Path, contents: Contents, config: TritonConfig, engine: EngineInfo) -> None:
    """Writes what turns the ONNX file into a plan on the target: the graph in its precision, the script, the config."""
    build = folder / "build"
    build.mkdir()
    data = contents.sealed.read(contents.manifest["parts"]["onnx"]["file"])
    note, precision = "", engine.precision
    if precision in ("int8", "fp8"):
        note = f"# The bundle's engine is {precision}, this plan is fp16: passdeploy run on the target calibrates.\n"
        precision = "fp16"
    if precision != "fp32":
        from passdeploy.engines._convert import to_half

        data = to_half(data, precision)
    name = f"model.{precision}.onnx"
    (build / name).write_bytes(data)
    script = build / "build_plan.sh"
    script.write_text(BUILD.format(onnx=name, note=note, shapes=_shapes(config, engine.batch)), encoding="utf-8")
    script.chmod(0o755)
    plan = replace(config, engine='platform: "tensorrt_plan"', cuda_graphs=True, parameters={})
    _write_config(build / "config.tensorrt.pbtxt", plan)
