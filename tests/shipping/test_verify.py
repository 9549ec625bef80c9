from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

from passdeploy.engines import _quantize
from passdeploy.engines.base import CompileInput, get_backend
from passdeploy.errors import BadInput, Unavailable
from passdeploy.latency import measure
from passdeploy.latency.measure import Settings, Timed
from passdeploy.latency.measurement import Comparison
from passdeploy.shipping import manifest, sums
from passdeploy.shipping.bundle import EngineSource, write_bundle
from passdeploy.shipping.contents import open_bundle
from passdeploy.shipping.hardware import Gpu, Machine, misfit
from passdeploy.shipping.runner import load
from passdeploy.shipping.sums import Refused
from passdeploy.shipping.verify import verify
from tests.shipping.conftest import cpu_target, make_source, report, write_onnx

A100 = Machine("x86_64", frozenset({"avx2"}), (Gpu("NVIDIA A100", "8.0"),), "13.0")
L4 = Machine("x86_64", frozenset({"avx2"}), (Gpu("NVIDIA L4", "8.9"),), "13.0")
CPU = Machine("x86_64", frozenset({"avx2"}), (), None)


def refused(bundle: Path, machine: Machine | None = None) -> str:
    """Both refuse, with the same one-line reason."""
    result = verify(bundle, machine=machine)
    assert not result.ok
    assert result.exit_code == 1
    assert result.reason
    assert "\n" not in result.reason
    with pytest.raises(Refused) as error:
        load(bundle, machine=machine)
    assert str(error.value) == result.reason
    return result.reason


def reseal(bundle: Path) -> None:
    """What someone does who tampers rather than corrupts."""
    (bundle / "SHA256SUMS").unlink()
    sums.write(bundle)


def edit(bundle: Path, change: Callable[[dict[str, object]], None], name: str = "bundle.json") -> None:
    manifest = json.loads((bundle / name).read_text())
    change(manifest)
    (bundle / name).write_text(json.dumps(manifest))
    reseal(bundle)


def test_a_tool_that_is_missing_here_is_no_refusal(sealed_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> str:
        raise Unavailable("signing: pip install model-signing")

    monkeypatch.setattr("passdeploy.shipping.verify.check_signature", missing)
    result = verify(sealed_bundle, key=sealed_bundle / "key.pub")
    assert (result.ok, result.exit_code, result.reason) == (False, 2, "signing: pip install model-signing")
    assert [check.outcome for check in result.checks][-1] == "unavailable"


def test_a_name_that_no_terminal_can_print_is_refused_all_the_same(sealed_bundle: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(sealed_bundle, tmp_path / "bundle"))
    with open(os.fsencode(bundle) + b"/\xe9.txt", "w"):
        pass
    assert refused(bundle) == "\\xe9.txt: not listed in SHA256SUMS; remove it or get the bundle again"


def test_an_intact_bundle_is_verified(sealed_bundle: Path) -> None:
    result = verify(sealed_bundle)
    assert result.ok
    assert result.exit_code == 0
    assert result.root == sums.digest_file(sealed_bundle / "SHA256SUMS")
    assert [check.outcome for check in result.checks] == ["passed", "skipped", "passed", "passed", "passed"]
    assert "tampering would not" in result.checks[1].message
    json.dumps(result.to_json())


def test_the_bundles_of_a_run_directory_are_named(sealed_bundle: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for budget in ("3x", "2x"):
        shutil.copytree(sealed_bundle, run / budget / "bundle")
    assert refused(run).endswith(f"; did you mean {run / '2x/bundle'} or {run / '3x/bundle'}?")
    (run / "search" / "bundle").mkdir(parents=True)
    shutil.rmtree(run / "3x")
    assert refused(run).endswith(f"; did you mean {run / '2x/bundle'}?")
    shutil.copytree(sealed_bundle, run / "bundle")
    assert refused(run).endswith(f"; did you mean {run / 'bundle'}?"), "that of the answer, where there is one"
    assert "mean" not in refused(run / "search")


def test_every_single_byte_change_is_refused(bundle: Path) -> None:
    """By verify and by the runner, at 560 positions over all files, their first and last bytes among them."""
    rng = np.random.default_rng(0)
    files = sorted(path for path in bundle.rglob("*") if path.is_file())
    positions = [(f, at) for f in files for at in (0, f.stat().st_size - 1)]
    sizes = np.array([f.stat().st_size for f in files], float)
    # By file first, so that the small ones get their share.
    drawn = rng.integers(len(files), size=560 - len(positions))
    positions += [(files[index], int(rng.integers(sizes[index]))) for index in drawn]
    for path, at in positions:
        before = path.read_bytes()
        value = bytes([before[at] ^ (1 << int(rng.integers(8)))])
        path.write_bytes(before[:at] + value + before[at + 1 :])
        refused(bundle)
        path.write_bytes(before)
    assert verify(bundle).ok, "the test itself left the bundle as it was"


def test_added_removed_and_truncated_files(bundle: Path) -> None:
    (bundle / "samples" / "extra.npy").write_bytes(b"")
    assert "samples/extra.npy: not listed" in refused(bundle)
    (bundle / "samples" / "extra.npy").unlink()
    for path in sorted(p for p in bundle.rglob("*") if p.is_file()):
        kept = path.read_bytes()
        path.unlink()
        refused(bundle)
        path.write_bytes(kept[:-1])
        refused(bundle)
        path.write_bytes(kept)
    assert verify(bundle).ok


def test_swapped_engine_is_refused_however_far_the_swap_goes(bundle: Path, tmp_path: Path) -> None:
    other = write_bundle(tmp_path / "other", make_source(tmp_path / "run2", seed=9))
    engines = Path("engines/cpu-onnxruntime-fp32-b1")
    shutil.copy(other / engines / "engine.onnx", bundle / engines / "engine.onnx")
    assert "engine.onnx: content does not match" in refused(bundle)
    reseal(bundle)
    assert "not the file that bundle.json is bound to" in refused(bundle)
    digest = sums.digest_file(bundle / engines / "engine.onnx")
    edit(bundle, lambda manifest: manifest["engines"][0].update(sha256=digest))
    assert "describes another engine" in refused(bundle)
    shutil.copy(other / engines / "engine.json", bundle / engines / "engine.json")
    reseal(bundle)
    assert "does not reproduce the sample outputs" in refused(bundle)


def test_swapped_onnx_is_refused(bundle: Path, tmp_path: Path) -> None:
    other = write_bundle(tmp_path / "other", make_source(tmp_path / "run2", seed=9))
    shutil.copy(other / "model.onnx", bundle / "model.onnx")
    reseal(bundle)
    assert "not the file that bundle.json is bound to" in refused(bundle)
    digest = sums.digest_file(bundle / "model.onnx")
    edit(bundle, lambda manifest: manifest["parts"]["onnx"].update(sha256=digest))
    assert "compiled from another ONNX file" in refused(bundle)


def _require(bundle: Path, **requires: object) -> None:
    edit(bundle, lambda manifest: manifest["engines"][0]["requires"].update(requires))


def test_other_hardware_is_refused(bundle: Path) -> None:
    _require(bundle, compute_capabilities=["8.0"])
    assert "for compute capability 8.0, this machine has NVIDIA L4 (8.9)" in refused(bundle, L4)
    assert "NVIDIA GPU of compute capability 8.0, this machine has none" in refused(bundle, CPU)
    _require(bundle, compute_capabilities=[], cpu_features=["amx_tile"])
    assert "needs a CPU with amx_tile" in refused(bundle, CPU)
    _require(bundle, cpu_features=[], machine="sparc64")
    assert "for sparc64, this machine is x86_64" in refused(bundle, CPU)


def test_hardware_rules() -> None:
    gpu = {"compute_capabilities": ["8.0"]}
    assert misfit(gpu, A100) is None
    assert misfit(gpu, L4) is not None
    assert misfit(gpu | {"or_newer": True}, L4) is None
    assert misfit({"compute_capabilities": ["10.0"], "or_newer": True}, A100) is not None
    assert misfit({"compute_capabilities": ["7.5", "8.9"]}, L4) is None
    assert misfit({"machine": "x86_64", "cpu_features": ["avx2"]}, CPU) is None
    assert misfit({"cpu_features": ["avx512f"]}, Machine("x86_64", frozenset(), (), None)) is None


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(("flags", "lacking"), [(["avx2", "avx512_vnni"], True), (["avx2"], False)])
def test_weights_of_eight_bits_are_not_run_where_their_sums_saturate(
    backend: str, flags: list[str], lacking: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sample outputs of a few images do not tell."""
    monkeypatch.setattr(_quantize, "cpu_flags", lambda: flags)
    monkeypatch.setattr(_quantize.platform, "machine", lambda: "x86_64")
    source = make_source(tmp_path / "run")
    target = replace(cpu_target(), backend=backend, precision="int8")
    engine = get_backend(backend).compile(CompileInput(source.onnx, samples=source.images), target)
    get_backend(backend).save(engine, tmp_path / "int8")
    source = replace(source, engines=(EngineSource(tmp_path / "int8", target),))
    contents = open_bundle(write_bundle(tmp_path / "bundle", source))
    (requires,) = (each.requires for each in contents.engines)
    assert ("its int8 weights need a CPU with one of" in (misfit(requires, CPU) or "")) == lacking
    for able in ("avx512_vnni", "avx_vnni", "amx_int8"):
        assert misfit(requires, replace(CPU, cpu_features=frozenset({"avx2", able}))) is None
    assert misfit(requires, Machine("aarch64", frozenset({"asimd"}), (), None)) is None
    assert misfit(requires, replace(CPU, cpu_features=frozenset())) is None  # not told


def test_the_engine_that_fits_is_chosen_among_several(tmp_path: Path) -> None:
    run = make_source(tmp_path / "run")
    wide = make_source(tmp_path / "run4", batch=4)
    engines = (run.engines[0], EngineSource(wide.engines[0].folder, cpu_target(4).with_(name="t4")))
    bundle = write_bundle(tmp_path / "bundle", make_source(tmp_path / "run", engines=engines))
    edit(bundle, lambda manifest: manifest["engines"][0]["requires"].update(compute_capabilities=["8.0"]))
    with load(bundle, machine=CPU) as model:
        assert model.engine.id == "t4-onnxruntime-fp32-b4"
    assert "engine 'nope'" in (verify(bundle, engine="nope").reason or "")


def test_manifest_of_another_schema_or_with_unknown_keys(bundle: Path) -> None:
    edit(bundle, lambda manifest: manifest.update(schema="passdeploy.bundle/99"))
    assert "passdeploy.bundle/99" in refused(bundle)
    edit(bundle, lambda manifest: manifest.update(schema="passdeploy.bundle/1", surprise=1))
    assert "surprise" in (verify(bundle).reason or "")


@pytest.mark.parametrize("part", ["engines", "parts", "samples", "classes", "input"])
def test_manifest_without_a_part_is_one_line(bundle: Path, part: str) -> None:
    edit(bundle, lambda manifest: manifest.pop(part))
    assert "bundle.json: malformed" in refused(bundle)


def test_bundle_without_engine_is_verified_up_to_the_hardware(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle", make_source(tmp_path / "run", engines=()))
    assert "holds no engine" in refused(bundle)
    assert verify(bundle, run=False).ok


def test_no_such_folder_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such bundle"):
        verify(tmp_path / "nothing")


@pytest.mark.parametrize(("limit", "status", "code"), [(1e4, "within_budget", 0), (1e-6, "over_budget", 1)])
def test_measuring_turns_unverified_into_an_answer(tmp_path: Path, limit: float, status: str, code: int) -> None:
    budget = {"asked": f"{limit:f}ms", "latency_ms": limit, "percentile": "p50", "scope": "engine"}
    source = make_source(tmp_path / "run", report=report(status="unverified", budget=budget))
    bundle = write_bundle(tmp_path / "bundle", source)
    assert verify(bundle).status == "unverified"
    result = verify(bundle, measure=True)
    assert result.ok
    assert (result.status, result.exit_code) == (status, code)
    assert result.latency_ms
    assert result.latency_ms["n"] > 0


@pytest.mark.parametrize("percentile", ["p50", "p90", "p99"])
def test_the_percentile_of_the_budget_gets_its_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, percentile: str
) -> None:
    """An engine of 20 ms would else be timed too rarely for p99, and the sealed status would stand."""
    budget = {"asked": "1s", "latency_ms": 1000.0, "percentile": percentile, "scope": "engine"}
    source = make_source(tmp_path / "run", report=report(status="unverified", budget=budget))
    asked: list[tuple[float, ...]] = []
    interleave = measure.interleave

    def watched(runners: Mapping[str, Timed], settings: Settings) -> Comparison:
        asked.append(settings.percentiles)
        return interleave(runners, settings)

    monkeypatch.setattr(measure, "interleave", watched)
    assert verify(write_bundle(tmp_path / "bundle", source), measure=True).status == "within_budget"
    assert asked == [(50.0, float(percentile[1:]))]


def _speedup_bundle(folder: Path, asked: str, dense: bool) -> Path:
    budget = {"asked": asked, "latency_ms": 1.0, "percentile": "p50", "scope": "engine"}
    changes: dict[str, object] = {"report": report(status="unverified", budget=budget)}
    if dense:
        changes["dense_onnx"] = write_onnx(folder / "dense.onnx", width=256)
    return write_bundle(folder / "bundle", make_source(folder / "run", **changes))


@pytest.mark.parametrize(("asked", "status"), [("1.2x", "within_budget"), ("1000x", "over_budget")])
def test_a_speedup_is_judged_beside_the_dense_graph(tmp_path: Path, asked: str, status: str) -> None:
    """The dense graph is 32 times as wide: no noise hides that."""
    result = verify(_speedup_bundle(tmp_path, asked, dense=True), measure=True)
    assert result.status == status, result.checks[-1].message
    assert result.speedup
    assert result.speedup["value"] > 1.2
    assert "times as fast as the dense graph" in result.checks[-1].message


def test_a_speedup_without_a_dense_graph_stays_open(tmp_path: Path) -> None:
    result = verify(_speedup_bundle(tmp_path, "2x", dense=False), measure=True)
    assert (result.status, result.exit_code) == ("unverified", 0)
    assert "no dense graph" in result.checks[-1].message


def test_a_speedup_in_int8_of_more_images_than_the_bundle_carries(tmp_path: Path) -> None:
    batch = 9
    source = make_source(tmp_path / "run", batch=batch)
    target = replace(cpu_target(batch), precision="int8")
    backend = get_backend(target.backend)
    samples = np.resize(source.images, (batch, *source.images.shape[1:]))
    backend.save(backend.compile(CompileInput(source.onnx, samples=samples), target), tmp_path / "int8")
    budget = {"asked": "1.2x", "latency_ms": 1.0, "percentile": "p50", "scope": "engine"}
    source = replace(
        source,
        engines=(EngineSource(tmp_path / "int8", target),),
        dense_onnx=write_onnx(tmp_path / "dense.onnx", batch=batch, width=256),
        report=report(status="unverified", budget=budget),
    )
    result = verify(write_bundle(tmp_path / "bundle", source), measure=True)
    assert result.status == "within_budget", result.checks[-1].message


def test_why_a_dense_graph_is_not_compiled_is_told(tmp_path: Path) -> None:
    write_onnx(tmp_path / "dense.onnx", batch=2)
    budget = {"asked": "2x", "latency_ms": 1.0, "percentile": "p50", "scope": "engine"}
    changes = {"report": report(status="unverified", budget=budget), "dense_onnx": tmp_path / "dense.onnx"}
    result = verify(write_bundle(tmp_path / "bundle", make_source(tmp_path / "run", **changes)), measure=True)
    assert result.status == "unverified"
    assert "exported for batch 2" in result.checks[-1].message


def test_what_runs_is_what_was_checked(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another sound bundle that takes its place after the checks is not run instead."""
    other = write_bundle(tmp_path / "other", make_source(tmp_path / "run2", seed=9))
    read = manifest.read

    def swap(data: bytes) -> manifest.BundleManifest:
        shutil.rmtree(bundle)
        shutil.copytree(other, bundle)
        return read(data)

    monkeypatch.setattr(manifest, "read", swap)
    assert "engine.onnx: content does not match its digest" in (verify(bundle).reason or "")


def test_end_to_end_is_measured_with_its_transfers(tmp_path: Path) -> None:
    budget = {"asked": "1s", "latency_ms": 1000.0, "percentile": "p50", "scope": "end_to_end"}
    source = make_source(tmp_path / "run", report=report(status="unverified", budget=budget))
    assert verify(write_bundle(tmp_path / "bundle", source), measure=True).status == "within_budget"


def test_what_a_runtime_raises_while_it_is_timed_is_one_line(
    sealed_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interleave(*_: object) -> NoReturn:
        raise RuntimeError("out of memory\nat a place in a library")

    monkeypatch.setattr("passdeploy.latency.measure.interleave", interleave)
    result = verify(sealed_bundle, measure=True)
    assert result.reason is not None
    assert "cannot be measured here: the engine cannot be run: out of memory" in result.reason


def test_what_a_runtime_raises_at_the_first_inference_is_one_line(
    sealed_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session that is made, and then finds that its cuDNN is not the one that it needs."""

    def run(*_: object) -> NoReturn:
        raise RuntimeError("CUDNN failure 4000\nat a place in a library")

    monkeypatch.setattr("passdeploy.shipping.executors.onnxruntime.OrtExecutor.run", run)
    assert "cannot run the sample images here (CUDNN failure 4000 at a place in a library)" in refused(sealed_bundle)


def test_a_status_about_something_else_is_not_measured_away(tmp_path: Path) -> None:
    source = make_source(tmp_path / "run", report=report(status="accuracy_below_floor"))
    result = verify(write_bundle(tmp_path / "bundle", source), measure=True)
    assert result.status == "accuracy_below_floor"


@pytest.mark.parametrize("flags", [(), ("--measure",)])
def test_the_command_needs_no_torch(flags: tuple[str, ...], sealed_bundle: Path) -> None:
    """On a host that only runs engines."""
    blocked = "import sys; sys.modules['torch'] = None\nfrom passdeploy.cli import main; main()"
    command = [sys.executable, "-c", blocked, "verify", str(sealed_bundle), *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "sample images reproduced" in done.stdout, done.stdout + done.stderr
    assert done.returncode in (0, 1) if flags else done.returncode == 0  # this machine may be slow
    assert ("latency" in done.stdout) == bool(flags)


def test_what_measuring_lacks_is_named(sealed_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "passdeploy.shipping.measuring", None)
    result = verify(sealed_bundle, measure=True)
    assert result.reason is not None and "measuring needs the whole installation" in result.reason


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["output"].update(shape=[5]),
        lambda m: m["engines"][0].update(requires=None),
        lambda m: m["engines"].clear() or m.update(engines=[[]]),
        lambda m: m.update(name=None),
        lambda m: m["input"].update(name=1),
        lambda m: m["classes"].__setitem__(0, None),
        lambda m: m["input"]["shape"].__setitem__(0, None),
        lambda m: m["engines"][0].update(precision="fp12"),
        lambda m: m["engines"][0].update(batch=1.5),
        lambda m: m["engines"][0].update(threads=10**30),
        lambda m: m["engines"][0]["requires"].update(cpu_features=None),
        lambda m: m["engines"][0]["requires"].update(compute_capabilities=[8.0]),
    ],
)
def test_a_manifest_of_another_shape_is_refused(bundle: Path, change: Any) -> None:
    path = bundle / "bundle.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    (bundle / "SHA256SUMS").unlink()
    sums.write(bundle)
    with pytest.raises(Refused):
        open_bundle(bundle)


def test_samples_that_are_no_array_are_refused(bundle: Path) -> None:
    """A zip archive, which numpy would open as several."""
    path = bundle / "samples" / "images.npy"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", b"")
    manifest = json.loads((bundle / "bundle.json").read_text())
    manifest["samples"]["images"]["sha256"] = sums.digest_file(path)
    (bundle / "bundle.json").write_text(json.dumps(manifest))
    (bundle / "SHA256SUMS").unlink()
    sums.write(bundle)
    with pytest.raises(Refused, match="not a numpy array"):
        open_bundle(bundle).samples()


def _reseal_samples(bundle: Path, name: str, content: bytes) -> None:
    (bundle / "samples" / f"{name}.npy").write_bytes(content)
    digest = sums.digest_file(bundle / "samples" / f"{name}.npy")
    edit(bundle, lambda manifest: manifest["samples"][name].update(sha256=digest))


def test_outputs_that_are_one_number_are_refused(bundle: Path) -> None:
    content = io.BytesIO()
    np.save(content, np.float32(0))
    _reseal_samples(bundle, "outputs", content.getvalue())
    assert "do not fit" in refused(bundle)


def test_an_array_that_claims_more_than_there_is_memory_is_refused(bundle: Path) -> None:
    content = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": (2**40, 2**10)}
    np.lib.format.write_array_header_1_0(content, header)
    _reseal_samples(bundle, "images", content.getvalue())
    assert "not a numpy array" in refused(bundle)


def test_settings_that_are_none_are_refused(bundle: Path) -> None:
    path = next(bundle.glob("engines/*/engine.json"))
    facts = json.loads(path.read_text())
    facts["meta"]["session"] = ["no", "settings"]
    path.write_text(json.dumps(facts))
    reseal(bundle)
    assert "holds no settings" in refused(bundle)


def test_each_check_is_one_line_however_narrow_the_screen(bundle: Path) -> None:
    command = [sys.executable, "-m", "passdeploy", "verify", str(bundle)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "40"})
    assert len(done.stdout.splitlines()) == 5, done.stdout + done.stderr
