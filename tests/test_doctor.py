from __future__ import annotations

import dataclasses
import json
import os
import shutil
import stat
import sys
from pathlib import Path
from types import SimpleNamespace

import onnxruntime
import pytest
import torch
from rich.console import Console

from passdeploy import doctor, environment
from passdeploy._probes import PACKAGES, Finding, Package, check_package, run
from passdeploy.data.fashion_mnist import FILES, _find
from passdeploy.doctor import diagnose, list_targets, render, render_targets, to_json
from passdeploy.engines.base import get_backend
from passdeploy.targets import ANY_GPU, DEVICES, Target


def text(renderable: object) -> str:
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(renderable)
    return console.export_text()


def program(folder: Path, name: str, script: str) -> None:
    """An executable of that name in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(stat.S_IRWXU)


@pytest.fixture(scope="module")
def findings() -> dict[str, Finding]:
    return {finding.name: finding for finding in diagnose()}


def test_what_runs_these_tests_is_found(findings: dict[str, Finding]) -> None:
    assert findings["Python"].ok
    assert findings["torch"].ok
    assert torch.__version__ in findings["torch"].detail
    assert findings["ONNX Runtime"].ok
    assert onnxruntime.__version__ in findings["ONNX Runtime"].detail
    assert "CPU" in findings["ONNX Runtime"].detail
    assert findings["nvcc"].ok == (shutil.which("nvcc") is not None or Path("/usr/local/cuda/bin/nvcc").exists())
    assert findings["fashion-mnist"].ok == (None not in map(_find, FILES))
    assert "cpu" in findings["measures on"].detail


def test_what_is_missing_says_how_to_get_it(findings: dict[str, Finding]) -> None:
    names = {package.name for package in PACKAGES}
    assert names <= set(findings)
    for finding in findings.values():
        assert "\n" not in finding.detail
        if not finding.ok and finding.name in names:
            assert finding.fix


def test_json(findings: dict[str, Finding]) -> None:
    content = json.loads(json.dumps(to_json(list(findings.values()))))
    assert content["schema"] == "passdeploy.doctor/1"
    assert content["ok"] is True
    assert len(content["findings"]) == len(findings)
    assert set(content["environment"]) == {"cpu", "gpu", "driver", "versions", "settings"}
    broken = Finding("machine", "torch", False, "gone", needed=True)
    assert to_json([broken])["ok"] is False


def test_table(findings: dict[str, Finding]) -> None:
    shown = text(render([*findings.values(), Finding("targets", "extra", False, "a [red]b[/red] [x]", "do [this]")]))
    for finding in findings.values():
        assert finding.name in shown
    assert "a [red]b[/red] [x]" in shown
    assert "do [this]" in shown


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("raise RuntimeError('half\\ninstalled')", "installed"),
        ("import os; os.abort()", "broken: ends with status -6"),
        ("import nothing_of_that_name", "No module named 'nothing_of_that_name'"),
    ],
)
def test_a_broken_package_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, said: str) -> None:
    (tmp_path / "brokenpkg.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    finding = check_package(Package("engines", "Broken", "brokenpkg", "pip install brokenpkg"))
    assert not finding.ok
    assert said in finding.detail
    assert "\n" not in finding.detail
    assert finding.fix == "pip install brokenpkg"
    assert "brokenpkg" not in sys.modules


def test_a_sound_package_and_one_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "soundpkg.py").write_text(
        "print('chatter'.upper(), file=__import__('sys').stderr); __version__ = '4.2'"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert check_package(Package("engines", "Sound", "soundpkg", "x")) == Finding("engines", "Sound", True, "4.2")
    gone = check_package(Package("engines", "Gone", "no_such_package.inner", "pip install it"))
    assert gone == Finding("engines", "Gone", False, "not installed", "pip install it")


def test_a_program_that_hangs() -> None:
    assert run([sys.executable, "-c", "import time; time.sleep(60)"], timeout=0.5) == (False, "no answer within 0.5 s")


def test_a_program_that_is_not_there() -> None:
    ok, said = run(["/no/such/program"])
    assert not ok
    assert "FileNotFoundError" in said


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    finding = doctor._compiler()
    assert not finding.ok
    assert "g++" in (finding.fix or "")


def test_a_folder_that_cant_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert not doctor._disk().ok


def test_a_machine_without_a_place_for_temporary_files(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(doctor.tempfile, "gettempdir", nowhere)
    finding = doctor._disk()
    assert not finding.ok and "TMPDIR" in (finding.fix or "")


def test_a_noisy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    monkeypatch.setattr(psutil, "cpu_percent", lambda interval: 60.0)
    assert not doctor._load().ok
    assert "60% of all cores busy" in doctor._load().detail
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval: 3.0)
    assert doctor._load().ok


def test_a_gpu_as_nvidia_smi_lists_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path, "nvidia-smi", 'echo "NVIDIA H100 80GB HBM3, 580.95.05, 81559 MiB, 9.0, 1980 MHz, 34, GPU-0"')
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    finding = doctor._gpu()
    assert finding.ok
    assert finding.detail == "NVIDIA H100 80GB HBM3 (81559 MiB, compute capability 9.0), driver 580.95.05"
    found = environment.environment()
    assert found["gpu"] == "NVIDIA H100 80GB HBM3"
    assert found["driver"] == "580.95.05"
    assert found["settings"]["GPU temperature"] == "34 °C"


def test_of_several_gpus_the_report_names_the_one_that_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = (
        'echo "NVIDIA A100, 580.95.05, 81559 MiB, 8.0, 1410 MHz, 34, GPU-aa"\n'
        'echo "NVIDIA L4, 580.95.05, 23034 MiB, 8.9, 2040 MHz, 41, GPU-bb"'
    )
    program(tmp_path, "nvidia-smi", script)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert environment.environment()["gpu"] == "NVIDIA A100", "nothing is known of which is used"
    monkeypatch.setattr(environment, "attached_gpus", lambda: ("NVIDIA L4",))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="bb"))
    found = environment.environment()
    assert (found["gpu"], found["settings"]["GPU temperature"]) == ("NVIDIA L4", "41 °C")


@pytest.mark.parametrize("script", ["exit 9", "echo 'NVIDIA-SMI has failed'", "echo"])
def test_a_driver_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    program(tmp_path, "nvidia-smi", script)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert environment.environment()["gpu"] is None
    assert not doctor._gpu().ok


def test_environment_is_what_a_report_takes() -> None:
    from passdeploy.reporting.schema import Environment

    found = environment.environment()
    Environment.model_validate(found)
    assert found["versions"]["torch"] == torch.__version__
    assert found["cpu"]
    assert {"threads", "governor", "load", "memory", "system"} <= set(found["settings"])
    assert f'"{os.uname().nodename}"' not in json.dumps(found)


def test_usable_cores() -> None:
    assert 1 <= environment.usable_cores() <= (os.cpu_count() or 1)


def test_a_containers_quota_bounds_the_threads_of_a_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(environment, "_cpu_quota", lambda: 2.5)
    target = Target("cpu", "test", None, "onnxruntime", "fp32", 1, 2, True)
    assert get_backend("onnxruntime").available(target) is None
    assert "to 2" in str(get_backend("onnxruntime").available(target.with_(threads=3)))


def test_targets() -> None:
    rows = {row.name: row for row in list_targets()}
    assert [name for name in rows if name != ANY_GPU] == list(DEVICES)
    cpu = rows["cpu"]
    assert cpu.attached
    assert cpu.measures
    assert cpu.backend == "onnxruntime"
    assert cpu.reason is None
    for row in rows.values():
        assert row.measures == (row.reason is None)
        assert row.attached or not row.measures
        json.dumps(dataclasses.asdict(row))
    shown = text(render_targets(list(rows.values())))
    for name in DEVICES:
        assert name in shown
