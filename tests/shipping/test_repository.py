from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import yaml

from passdeploy.engines.base import CompileInput
from passdeploy.engines.onnxruntime import OnnxRuntime
from passdeploy.errors import BadInput
from passdeploy.shipping import replace as replace_module
from passdeploy.shipping import repository, sums
from passdeploy.shipping.bundle import EngineSource, write_bundle
from passdeploy.shipping.contents import open_bundle
from passdeploy.shipping.repository import find_bundle, model_name, write_repository
from passdeploy.shipping.runner import load
from passdeploy.shipping.servers import triton
from passdeploy.shipping.servers.kserve import memory_gib, resource_name
from passdeploy.shipping.servers.triton_config import TritonConfig, quote, render
from passdeploy.shipping.servers.vendor import copy_runner
from passdeploy.shipping.sums import Refused
from passdeploy.targets import Target
from tests.shipping.conftest import SHAPE, make_source, report, write_onnx


def gpu_bundle(folder: Path, *engines: tuple[str, str, str], **changes: object) -> Path:
    """A bundle of engines that are only bytes here: (backend, target, compute capability). Nothing is run."""
    from passdeploy.engines.base import Engine
    from passdeploy.engines.files import save_engine

    sources = []
    for number, (backend, name, capability) in enumerate(engines):
        target = Target(name, f"NVIDIA {name}", capability, backend, "fp16", 1, 1, attached=False)
        meta = {"version": "11.0.0", "compute_capabilities": [capability], "options": {}}
        where = folder / f"engine{number}"
        save_engine(Engine(backend, f"{backend} {name}".encode(), ".engine", meta), where)
        sources.append(EngineSource(where, target))
    return write_bundle(folder / "bundle", make_source(folder / "run", engines=tuple(sources), **changes))


def test_triton_repository_of_a_cpu_bundle(sealed_bundle: Path, tmp_path: Path) -> None:
    told = write_repository(tmp_path / "models", sealed_bundle, "triton")
    model = tmp_path / "models" / "small-on-cpu"
    assert (told.kind, told.model, told.folder / told.model) == ("python", "small-on-cpu", model)
    assert "onnxruntime==" in (told.note or "")
    assert open_bundle(model / "1/bundle").sealed.root == open_bundle(sealed_bundle).sealed.root
    assert (model / "labels.txt").read_text().split() == ["cat", "dog", "owl", "eel", "ant"]
    warmup = np.frombuffer((model / "warmup/images").read_bytes(), np.float32).reshape(SHAPE)
    assert np.array_equal(warmup, open_bundle(sealed_bundle).samples()[0][0])
    config = (model / "config.pbtxt").read_text()
    assert 'backend: "python"' in config
    assert "dims: [ 3, 12, 10 ]" in config


def test_the_runner_beside_the_model_needs_nothing_else(sealed_bundle: Path, tmp_path: Path) -> None:
    """In a process that finds numpy and onnxruntime, but no other passdeploy."""
    write_repository(tmp_path / "models", sealed_bundle, "triton", name="net")
    version = tmp_path / "models/net/1"
    program = (
        "import sys; sys.path.insert(0, sys.argv[1] + '/runner')\n"
        "import numpy as np; import passdeploy; from passdeploy.shipping.runner import load\n"
        "assert passdeploy.__file__.startswith(sys.argv[1]), passdeploy.__file__\n"
        "with load(sys.argv[1] + '/bundle') as model:\n"
        "    images, expected = model.contents.samples(); print(abs(model.run(images) - expected).max() < 1e-4)\n"
        "print(sorted({'torch', 'pydantic', 'onnx'} & set(sys.modules)))\n"
    )
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(version)], capture_output=True, text=True, env=variables, cwd=tmp_path
    )
    assert done.stdout.split() == ["True", "[]"], done.stderr


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "tensorrt_rtx"])
def test_what_is_carried_along_is_complete(backend: str, tmp_path: Path) -> None:
    """The backend's executor and everything of passdeploy that it imports, lazily too, is there."""
    copy_runner(tmp_path / "runner", [backend])
    module = "tensorrt" if backend == "tensorrt_rtx" else backend
    names = [f"shipping.executors.{module}", "shipping.runner", "shipping.signing"]
    names += {
        "onnxruntime": ["engines.onnxruntime"],
        "tensorrt_rtx": ["engines._cuda", "engines._trt_context"],
    }.get(backend, [])
    program = "import sys; sys.path.insert(0, sys.argv[1])\n" + "\n".join(f"import passdeploy.{n}" for n in names)
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-c", program, str(tmp_path / "runner")]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_rtx_engines_are_no_plans_and_bring_a_build_script(tmp_path: Path) -> None:
    bundle = gpu_bundle(tmp_path, ("tensorrt_rtx", "a100", "8.0"))
    told = write_repository(tmp_path / "models", bundle, "triton", name="net")
    model = tmp_path / "models/net"
    assert told.kind == "onnxruntime"
    assert "build_plan.sh" in (told.note or "")
    config = (model / "config.pbtxt").read_text()
    assert 'platform: "onnxruntime_onnx"' in config
    assert "KIND_GPU" in config
    assert (model / "1/model.onnx").read_bytes() == (bundle / "model.onnx").read_bytes()
    assert not list(model.rglob("*.plan"))
    with pytest.raises(Refused, match="no plan of the full TensorRT"):
        write_repository(tmp_path / "models", bundle, "triton", name="net", kind="tensorrt")


def test_the_build_script_builds_with_trtexec_and_switches_over(tmp_path: Path) -> None:
    """A stand-in for trtexec notes its arguments and writes the file; the rest of the script is real."""
    bundle = gpu_bundle(tmp_path, ("tensorrt_rtx", "a100", "8.0"))
    write_repository(tmp_path / "models", bundle, "triton", name="net")
    model, tools = tmp_path / "models/net", tmp_path / "tools"
    tools.mkdir()
    (tools / "trtexec").write_text(
        '#!/bin/sh\n[ "$1" = --help ] && { echo "--stronglyTyped"; exit; }\n'
        'echo "$@" > ../seen\nfor a in "$@"; do case $a in --saveEngine=*) echo plan > "${a#*=}";; '
        '--onnx=*) [ -f "${a#*=}" ] || exit 3;; esac; done\n'
    )
    (tools / "trtexec").chmod(0o755)
    variables = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}"}
    script = model / "build/build_plan.sh"
    done = subprocess.run(["sh", str(script)], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (model / "1/model.plan").read_text() == "plan\n"
    seen = (model.parent / "seen").read_text()
    assert "--stronglyTyped" in seen and "--noTF32" in seen, "as passdeploy's own engines are built"
    config = (model / "config.pbtxt").read_text()
    assert 'platform: "tensorrt_plan"' in config
    assert "graphs: true" in config
    import onnx

    kinds = {tensor.data_type for tensor in onnx.load(str(model / "build/model.fp16.onnx")).graph.initializer}
    assert onnx.TensorProto.FLOAT16 in kinds, "the precision stands in the graph"
    missing = subprocess.run(["sh", str(script)], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True)
    assert missing.returncode == 2
    assert "trtexec: not found" in missing.stderr


def test_a_graph_whose_batch_is_free_says_how_far_it_goes(tmp_path: Path) -> None:
    """trtexec takes one image for all batches where it is told nothing; a plan takes none beyond its own profile."""
    free = write_onnx(tmp_path / "free.onnx", batch="n")
    bundle = gpu_bundle(tmp_path, ("tensorrt_rtx", "a100", "8.0"), ("tensorrt", "a100", "8.0"), onnx=free)
    for kind, largest in (("onnxruntime", 8), ("tensorrt", 1)):
        write_repository(tmp_path / kind, bundle, "triton", name="net", kind=kind)
        assert f"max_batch_size: {largest}\n" in (tmp_path / kind / "net/config.pbtxt").read_text()
    script = (tmp_path / "onnxruntime/net/build/build_plan.sh").read_text()
    assert " --minShapes=images:1x3x12x10 --optShapes=images:1x3x12x10 --maxShapes=images:8x3x12x10 " in script


def test_plans_go_by_compute_capability(tmp_path: Path) -> None:
    engines = (("tensorrt", "a100", "8.0"), ("tensorrt_rtx", "l4", "8.9"), ("tensorrt", "t4", "7.5"))
    bundle = gpu_bundle(tmp_path, *engines)
    told = write_repository(tmp_path / "models", bundle, "triton", name="net")
    model = tmp_path / "models/net"
    assert told.kind == "tensorrt"
    assert sorted(p.name for p in (model / "1").iterdir()) == ["model-sm75.plan", "model-sm80.plan"]
    assert (model / "1/model-sm80.plan").read_bytes() == b"tensorrt a100"
    config = (model / "config.pbtxt").read_text()
    assert 'cc_model_filenames [ { key: "8.0" value: "model-sm80.plan" } ]' in config
    assert "8.9" not in config


@pytest.mark.parametrize(("server", "asks"), [("triton", "Triton's Python"), ("mlserver", "MLServer's Python")])
def test_a_gpus_server_is_told_all_that_pip_must_install(tmp_path: Path, server: str, asks: str) -> None:
    engines = ("tensorrt", "a100", "8.0"), ("tensorrt_rtx", "l4", "8.9"), ("onnxruntime", "t4", "7.5")
    told = write_repository(tmp_path / "models", gpu_bundle(tmp_path, *engines), server, kind="python")
    assert told.note == (
        f"{asks}, 3.11 or newer, needs numpy, cuda-bindings, onnxruntime-gpu==11.0.0, tensorrt-rtx-cu13==11.0.0, "
        "tensorrt==11.0.0"
    )


def test_mlserver_and_kserve(sealed_bundle: Path, tmp_path: Path) -> None:
    write_repository(tmp_path / "m", sealed_bundle, "mlserver", name="net")
    # All models run in one process, on the runner that the first one brings.
    executors = {path.stem for path in (tmp_path / "m/net/runner/passdeploy/shipping/executors").glob("[!_]*.py")}
    assert executors == {"base", "onnxruntime", "openvino", "tensorrt"}
    settings = json.loads((tmp_path / "m/net/model-settings.json").read_text())
    assert settings["implementation"] == "passdeploy_runtime.PassdeployRuntime"
    assert settings["inputs"][0]["shape"] == [-1, *SHAPE]
    assert "version" not in settings["parameters"], "a new bundle takes the place of the old one"
    assert (tmp_path / "m/net/passdeploy_runtime.py").is_file()
    told = write_repository(tmp_path / "k", sealed_bundle, "kserve", name="Net_1", storage_uri="s3://b/k")
    assert told.kind == "onnxruntime"
    service = yaml.safe_load((tmp_path / "k/inferenceservice.yaml").read_text())
    assert service["metadata"]["name"] == "net-1"
    assert service["spec"]["predictor"]["model"]["storageUri"] == "s3://b/k"
    assert "nvidia.com/gpu" not in str(service)
    assert (tmp_path / "k/Net_1/1/model.onnx").is_file()


def int8_bundle(folder: Path) -> Path:
    """An int8 engine for three threads of a CPU."""
    source, backend = make_source(folder / "run"), OnnxRuntime()
    target = Target("cpu", "a CPU", None, backend.name, "int8", 1, 3, attached=True)
    engine = backend.compile(CompileInput(source.onnx, samples=source.images), target)
    backend.save(engine, folder / "int8")
    return write_bundle(
        folder / "bundle", dataclasses.replace(source, engines=(EngineSource(folder / "int8", target),))
    )


def test_a_cpu_is_served_the_engine_that_was_measured(tmp_path: Path) -> None:
    bundle = int8_bundle(tmp_path)
    told = write_repository(tmp_path / "k", bundle, "kserve", name="net", instances=2, storage_uri="s3://b/k")
    (engine,) = open_bundle(bundle).engines
    assert told.kind == "onnxruntime"
    if features := engine.requires.get("cpu_features_any"):  # what it was compiled on can sum eight bits, others can't
        assert told.note is not None and f"a CPU with {' or '.join(features)}" in told.note
    else:
        assert told.note is None
    assert (tmp_path / "k/net/1/model.onnx").read_bytes() == (bundle / engine.file).read_bytes()
    assert (bundle / engine.file).read_bytes() != (bundle / "model.onnx").read_bytes()
    model = yaml.safe_load((tmp_path / "k/inferenceservice.yaml").read_text())["spec"]["predictor"]["model"]
    assert model["resources"]["requests"]["cpu"] == model["resources"]["limits"]["cpu"] == "6"


def test_kserves_memory_holds_the_model(sealed_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(instances: int) -> int:
        write_repository(tmp_path / "k", sealed_bundle, "kserve", name="net", instances=instances, storage_uri="s3://b")
        model = yaml.safe_load((tmp_path / "k/inferenceservice.yaml").read_text())["spec"]["predictor"]["model"]
        assert model["resources"]["requests"] == model["resources"]["limits"]
        return int(model["resources"]["limits"]["memory"].removesuffix("Gi"))

    write = triton.write_model

    def write_large(folder: Path, *given: object, **options: object) -> str:
        kind = write(folder, *given, **options)  # type: ignore[arg-type]
        with (folder / "1/model.onnx").open("r+b") as file:
            file.truncate(600 * 2**20)  # a hole: nothing is written
        return kind

    assert (asked(1), asked(2)) == (1, 1), "a small model"
    monkeypatch.setattr(triton, "write_model", write_large)
    assert 2 < asked(1) < asked(2) <= 5
    assert memory_gib(tmp_path / "k/net", 1, gpu=True) == asked(1) + 3


def test_an_engine_that_is_not_served_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = int8_bundle(tmp_path)
    contents = open_bundle(bundle)
    other = dataclasses.replace(contents, engines=(dataclasses.replace(contents.engines[0], backend="openvino"),))
    monkeypatch.setattr(repository, "open_bundle", lambda *_: other)
    told = write_repository(tmp_path / "t", bundle, "triton", name="net", kind="onnxruntime")
    assert told.note == "serves the ONNX file in fp32: Triton's ONNX Runtime loads no int8 engine of openvino"
    assert (tmp_path / "t/net/1/model.onnx").read_bytes() == (bundle / "model.onnx").read_bytes()


def test_only_the_repository_has_to_be_writable(
    sealed_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, make = tmp_path / "models", tempfile.mkdtemp

    def refusing(dir: Path, prefix: str) -> str:
        if Path(dir) == tmp_path.resolve():
            raise PermissionError(13, "Permission denied", str(dir))
        return make(dir=dir, prefix=prefix)

    monkeypatch.setattr(tempfile, "mkdtemp", refusing)
    write_repository(models, sealed_bundle, "triton", name="net")
    assert [path.name for path in models.iterdir()] == ["net"]


def test_a_model_is_replaced_and_its_neighbours_stay(sealed_bundle: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    write_repository(models, sealed_bundle, "triton", name="a", kind="onnxruntime")
    write_repository(models, sealed_bundle, "triton", name="b")
    write_repository(models, sealed_bundle, "triton", name="a")
    assert (models / "a/1/model.py").is_file()
    assert not (models / "a/1/model.onnx").exists()
    assert sorted(path.name for path in models.iterdir()) == ["a", "b"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models"]


def test_damaged_bundles_are_not_shipped(bundle: Path, tmp_path: Path) -> None:
    (bundle / "model.onnx").write_bytes(b"x")
    with pytest.raises(Refused, match=r"model\.onnx: content"):
        write_repository(tmp_path / "models", bundle, "triton")
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize("server", ["triton", "mlserver", "kserve"])
def test_a_goal_that_was_missed_is_named(server: str, tmp_path: Path) -> None:
    source = make_source(tmp_path / "run", report=report(status="over_budget"))
    told = write_repository(tmp_path / "models", write_bundle(tmp_path / "bundle", source), server, name="net")
    assert "its run ended over_budget" in (told.note or "")


def test_finding_the_bundle_of_a_run(sealed_bundle: Path, tmp_path: Path) -> None:
    import shutil

    run = tmp_path / "run"
    with pytest.raises(BadInput, match="neither a bundle nor a run"):
        find_bundle(run)
    shutil.copytree(sealed_bundle, run / "2x/bundle")
    assert find_bundle(run) == run / "2x/bundle"
    shutil.copytree(sealed_bundle, run / "3x/bundle")
    with pytest.raises(BadInput, match=r"several bundles; give one of .*2x, .*3x"):
        find_bundle(run)
    shutil.copytree(sealed_bundle, run / "bundle")
    assert find_bundle(run) == run / "bundle"
    assert find_bundle(run / "3x/bundle") == run / "3x/bundle"


def test_bad_input_is_one_line(sealed_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such server; did you mean triton"):
        write_repository(tmp_path / "m", sealed_bundle, "tritn")
    with pytest.raises(BadInput, match="no such kind"):
        write_repository(tmp_path / "m", sealed_bundle, "triton", kind="pythn")
    with pytest.raises(BadInput, match="at least 1"):
        write_repository(tmp_path / "m", sealed_bundle, "triton", instances=0)
    for inside in (sealed_bundle, sealed_bundle / "models", sealed_bundle / "samples/../models"):
        with pytest.raises(BadInput, match="is the bundle itself or lies in it"):
            write_repository(inside, sealed_bundle, "triton")
    with pytest.raises(Refused, match="no such engine"):
        write_repository(tmp_path / "m", sealed_bundle, "triton", engine="nope")
    assert sums.open_sealed(sealed_bundle)


def test_kserve_gets_a_repository_for_each_model(sealed_bundle: Path, tmp_path: Path) -> None:
    """All in one would be loaded by each of the services, with the memory of one."""
    for _ in range(2):
        write_repository(tmp_path / "m", sealed_bundle, "kserve", name="one")
    with pytest.raises(BadInput, match="holds the model one already"):
        write_repository(tmp_path / "m", sealed_bundle, "kserve", name="other")


def test_a_protected_bundle_makes_models_that_can_be_replaced(bundle: Path, tmp_path: Path) -> None:
    for path in (*bundle.rglob("*"), bundle):
        path.chmod(path.stat().st_mode & ~0o222)
    for server, inside in (("triton", "1/bundle"), ("mlserver", "bundle")):
        write_repository(tmp_path / server, bundle, server, name="m")
        copy = tmp_path / server / "m" / inside
        assert sums.open_sealed(copy).root == sums.open_sealed(bundle).root
        assert all(path.stat().st_mode & 0o200 for path in (*copy.rglob("*"), copy))


@pytest.mark.parametrize("server", ["triton", "mlserver"])
def test_a_link_to_a_model_is_replaced_by_the_model(server: str, sealed_bundle: Path, tmp_path: Path) -> None:
    write_repository(tmp_path / "m", sealed_bundle, server, name="v1")
    (tmp_path / "m/current").symlink_to("v1")
    write_repository(tmp_path / "m", sealed_bundle, server, name="current")
    assert (tmp_path / "m/v1/1" if server == "triton" else tmp_path / "m/v1/bundle").is_dir()
    assert not (tmp_path / "m/current").is_symlink() and (tmp_path / "m/current").is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"], "no work folder is left"


@pytest.mark.parametrize("server", ["triton", "mlserver"])
def test_only_a_model_is_replaced(server: str, sealed_bundle: Path, tmp_path: Path) -> None:
    """A repository may be a folder that holds other things, of the model's name too."""
    (tmp_path / "m/docs").mkdir(parents=True)
    kept = [tmp_path / "m/docs/thesis.tex", tmp_path / "m/notes"]
    for path in kept:
        path.write_text("years")
    for name in ("docs", "notes"):
        with pytest.raises(BadInput, match=f"{name}: exists and is no model; give another --name or --out"):
            write_repository(tmp_path / "m", sealed_bundle, server, name=name)
    assert [path.read_text() for path in kept] == ["years", "years"]
    (tmp_path / "m/empty").mkdir()
    for _ in range(2):
        write_repository(tmp_path / "m", sealed_bundle, server, name="empty")


def test_backends_that_need_torch_are_not_vendored(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="inductor"):
        copy_runner(tmp_path / "runner", ["inductor"])


def test_names_and_strings_are_made_safe() -> None:
    assert model_name("../weird name!") == "weird_name"
    assert model_name("...") == "model"
    assert quote('a"b\\c\n') == '"a\\"b\\\\c\\n"'


def test_budgets_of_a_run_with_a_long_name_are_services_of_their_own() -> None:
    long = "deeplabv3_mobilenet_v3_large-fashion-scenes-l40s-"
    assert len({resource_name(long + budget) for budget in ("1.25x", "1.5x", "2x", "2.5x")}) == 4
    assert resource_name("resnet20-cifar10-cpu-1.5x") == "resnet20-cifar10-cpu-1-5x"


def test_a_bundle_that_a_run_has_withdrawn_is_not_found(sealed_bundle: Path, tmp_path: Path) -> None:
    """It still lies in the stage's folder."""
    shutil.copytree(sealed_bundle, tmp_path / "run" / "ship" / "bundle")
    (tmp_path / "run" / "ship" / "stage.json").write_text("{}")
    with pytest.raises(BadInput, match="neither a bundle nor a run that has one"):
        find_bundle(tmp_path / "run")
    shutil.copytree(sealed_bundle, tmp_path / "run" / "2x" / "bundle")
    assert find_bundle(tmp_path / "run") == tmp_path / "run" / "2x" / "bundle"


@pytest.mark.parametrize("swaps", [True, False])
def test_what_is_replaced_takes_nothing_else_along(
    swaps: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not swaps:
        monkeypatch.setattr(replace_module, "_exchange", lambda *_: False)
    for name, text in (("net", "old"), ("net.old", "kept by the user"), ("work/net", "new")):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").write_text(text)
    replace_module.replace_folder(tmp_path / "work" / "net", tmp_path / "net")
    assert (tmp_path / "net" / "file").read_text() == "new"
    assert (tmp_path / "net.old" / "file").read_text() == "kept by the user"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net", "net.old", "work"]
    assert not list((tmp_path / "work").iterdir())


@pytest.mark.parametrize("swaps", [True, False])
def test_what_cannot_be_removed_does_not_undo_what_is_there_now(
    swaps: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton's Python leaves compiled files of its own user in the model that it serves."""
    if not swaps:
        monkeypatch.setattr(replace_module, "_exchange", lambda *_: False)
    monkeypatch.setattr(os, "unlink", denied)
    for name in ("net", "work/net"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").write_text(name)
    replace_module.replace_folder(tmp_path / "work" / "net", tmp_path / "net")
    assert (tmp_path / "net" / "file").read_text() == "work/net"


def denied(*_: object, **__: object) -> None:
    raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize("name", ["2x_net", "___", "Net_1", "9" * 80])
def test_kubernetes_takes_the_name(name: str) -> None:
    found = resource_name(name)
    assert re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", found), found
    assert len(found) <= 63


def test_the_config_of_a_batched_engine_prefers_its_batch() -> None:
    common = {"input_name": "images", "input_dims": [3, 4, 4], "output_name": "logits", "output_dims": [2]}
    text = render(
        TritonConfig("n", 'backend: "python"', 16, gpu=False, preferred_batch=4, queue_delay_us=100, **common)
    )  # type: ignore[arg-type]
    assert "preferred_batch_size: [ 4 ]" in text
    assert "max_queue_delay_microseconds: 100" in text
    fixed = render(TritonConfig("n", 'platform: "tensorrt_plan"', 0, gpu=True, **common))  # type: ignore[arg-type]
    assert "dynamic_batching" not in fixed


def test_a_batched_bundle_behind_the_runner(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle", make_source(tmp_path / "run", batch=4))
    write_repository(tmp_path / "models", bundle, "triton", name="net")
    assert "preferred_batch_size: [ 4 ]" in (tmp_path / "models/net/config.pbtxt").read_text()
    with load(tmp_path / "models/net/1/bundle") as model:
        assert model.engine.batch == 4
