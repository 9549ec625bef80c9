"""benchmarks/gpu.py and gpu_compare.py, as far as they need no GPU: rows, resuming, pages, verdicts."""

from __future__ import annotations

import copy
import importlib
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import other_software
from benchmarks.gpu_compare import FAILURES, Metric, compare, judge, main, metrics
from benchmarks.gpu_sections.base import Bench
from benchmarks.gpu_sections.budgets import command, row_of
from benchmarks.gpu_sections.summary import render
from passdeploy.cli import app
from tests.reporting.variants import data

ROOT = Path(__file__).parents[2]
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")


def ratio(value: float, width: float = 0.01) -> dict[str, Any]:
    return {"value": value, "low": value * (1 - width), "high": value * (1 + width), "n": 40, "confidence": 0.95}


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    said: list[str] = []
    made = Bench("NVIDIA Test 80GB", "9.0", "h100", tmp_path / "nvidia-test-80gb", tmp_path / "runs", say=said.append)
    made.folder.mkdir()
    facts = {"device": made.device, "compute_capability": "9.0", "driver": "580.1", "quick": False}
    (made.folder / "machine.json").write_text(json.dumps(facts | {"versions": {"torch": "2.13.0"}}))
    return made


def fill(bench: Bench, speedup: float = 2.05, status: str = "within_budget", compiled: float = 1.4) -> None:
    """Rows as the sections write them."""
    report = data()
    report["status"] = status
    report["speedup"] |= {"latency": speedup, "latency_ci95": [speedup * 0.99, speedup * 1.01]}
    report["rebuilds"] = {"of": "builds", "n": 3, "spread": 0.0123, "latency_ms": [1.0, 1.0, 1.0123], "reason": None}
    bench.case("budgets", "resnet50 fp16 batch 64 2x", lambda: row_of(report))
    engine = {
        "dense_ms": 9.0,
        "pruned_ms": 4.0,
        "speedup": ratio(speedup),
        "macs": 3.6,
        "realisation": 0.6,
        "noisy": False,
    }
    bench.case("engines", "resnet18 fp16 batch 64 inductor", lambda: engine)
    bench.case("engines", "resnet18 fp16 batch 64 tensorrt", lambda: {"skipped": "TensorRT's libraries are missing"})
    bench.case("rtx", "attached (CURRENT) fp16", lambda: {"build_s": 2.0, "difference": 1e-3, "p50_ms": 0.4})
    bench.case("search", "resnet18 batch 64 masked kernels",
               lambda: {"step_ratio": ratio(1.04), "search_step_s": 0.104, "plain_step_s": 0.1})  # fmt: skip
    case = {
        "us": {"kernel": 80.0},
        "of_copy_bandwidth": 0.9,
        "times_eager": ratio(3.5),
        "times_compile": ratio(compiled),
    }
    (bench.folder / "kernels.json").write_text(
        json.dumps({"cases": {"masked_affine_act 64x112x112": case}, "copy_gb_per_s": 2900.0})
    )


@without_gpu
@pytest.mark.parametrize("script", ["gpu.py", "kernels.py"])
def test_without_a_gpu_it_is_one_line_and_exit_2(script: str) -> None:
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks" / script)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert f"benchmarks/{script}: no NVIDIA GPU" in done.stderr


def test_unknown_sections_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks import gpu

    assert gpu.main(["kernel"]) == 2
    assert "no section kernel; known: rtx, kernels" in capsys.readouterr().err
    for name in gpu.SECTIONS:
        assert callable(importlib.import_module(f"benchmarks.gpu_sections.{name}").run)


def test_cases_that_are_there_are_not_done_again(bench: Bench) -> None:
    calls: list[str] = []

    def broken() -> dict[str, Any]:
        calls.append("broken")
        raise ValueError("no\nluck")

    for _ in range(2):
        bench.case("engines", "a", lambda: calls.append("a") or {"dense_ms": 1.0})  # type: ignore[func-returns-value]
        bench.case("engines", "b", broken)
    assert calls == ["a", "broken"]
    assert [row["key"] for row in bench.rows("engines")] == ["a", "b"]
    assert bench.rows("engines")[1]["error"] == "ValueError: no luck"
    bench.retry = True
    bench.case("engines", "a", broken)
    bench.case("engines", "b", lambda: {"dense_ms": 2.0})
    assert calls == ["a", "broken"]
    assert [row.get("dense_ms") for row in bench.rows("engines")] == [1.0, 2.0]


def test_what_lacked_a_library_is_asked_for_again(bench: Bench) -> None:
    found = [{"skipped": "no TensorRT"}, {"skipped": "no TensorRT"}, {"dense_ms": 1.0}]
    for row in found:
        bench.case("engines", "a", lambda row=row: row)  # type: ignore[misc]
    lines = (bench.folder / "engines.jsonl").read_text().splitlines()
    assert len(lines) == 2 and bench.rows("engines")[0]["dense_ms"] == 1.0
    bench.case("engines", "a", lambda: {"dense_ms": 2.0})
    assert bench.rows("engines")[0]["dense_ms"] == 1.0


def test_a_row_that_was_cut_off_is_done_again(bench: Bench) -> None:
    bench.case("search", "a", lambda: {"n": 1})
    path = bench.folder / "search.jsonl"
    path.write_text(path.read_text() + '{"key": "b", "n"')
    assert [row["key"] for row in bench.rows("search")] == ["a"]
    bench.case("search", "b", lambda: {"n": 2})
    bench.case("search", "c", lambda: {"n": 3})
    assert [(row["key"], row["n"]) for row in bench.rows("search")] == [("a", 1), ("b", 2), ("c", 3)]


def test_the_summary_names_the_device_and_holds_every_section(bench: Bench) -> None:
    fill(bench)
    page = render(bench)
    assert page.startswith("# NVIDIA Test 80GB\n\nCompute capability 9.0, driver 580.1; torch 2.13.0.")
    for said in (
        "## Budgets",
        "## Kernels",
        "## Search",
        "## Engines",
        "## TensorRT-RTX on this GPU",
        "2.05x (2.03 to 2.07)",
    ):
        assert said in page
    assert "| 0.012 |" in page.split("## Kernels")[0], "how far builds lie apart"
    assert "of copy bandwidth of at least 0.85: 1 of 1" in page
    assert "TensorRT's libraries are missing" in page
    widths = {len(line.split("|")) for line in page.split("## Engines")[1].split("## ")[0].splitlines() if "|" in line}
    assert len(widths) == 1


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        (Metric(2.0, 1.98, 2.02), Metric(1.8, 1.78, 1.82), "regressed"),
        (Metric(2.0, 1.98, 2.02), Metric(1.97, 1.95, 1.99), "can't tell"),
        (Metric(2.0, 1.5, 2.5), Metric(1.5, 1.2, 1.8), "can't tell"),
        (Metric(2.0, 1.995, 2.005), Metric(2.0, 1.995, 2.005), "same"),
        (Metric(2.0, 1.98, 2.02), Metric(2.3, 2.28, 2.32), "improved"),
        (Metric(2.0), Metric(1.0), "can't tell"),
        (Metric(2.0, 1.98, 2.02), Metric(None), "failed"),
        (Metric(None), Metric(2.0), "improved"),
        (Metric(2.0, 1.98, 2.02, True), Metric(1.98, 1.96, 2.0, False), "budget missed"),
        (Metric(1.9, 1.88, 1.92, False), Metric(1.9, 1.88, 1.92, False), "can't tell"),
    ],
)
def test_verdicts_are_by_interval(old: Metric, new: Metric, verdict: str) -> None:
    assert judge(old, new) == verdict


def test_what_is_better_smaller_is_turned_round(bench: Bench) -> None:
    fill(bench)
    step = metrics(bench.folder)["resnet18 batch 64 masked kernels: step"]
    assert step.value == pytest.approx(1 / 1.04)
    assert step.low < step.value < step.high  # type: ignore[operator]


def test_a_regression_fails_and_is_shown(bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(bench, compiled=1.2)
    new = tmp_path / "new" / bench.folder.name
    new.parent.mkdir()
    bench.folder.rename(new)
    stored = Bench(bench.device, "9.0", "h100", tmp_path / "stored" / new.name, tmp_path, say=lambda line: None)
    page = tmp_path / "page.md"
    arguments = [str(new.parent), "--baseline", str(tmp_path / "stored"), "--markdown", str(page)]
    assert main(arguments) == 0
    assert "No baseline of NVIDIA Test 80GB" in page.read_text()
    stored.folder.mkdir(parents=True)
    (stored.folder / "machine.json").write_text((new / "machine.json").read_text())
    fill(stored)
    assert main(arguments) == 1
    assert page.read_text().startswith("## ❌ Regressed on NVIDIA Test 80GB")
    (line,) = [line for line in page.read_text().splitlines() if "regressed |" in line]
    assert line.startswith("| masked_affine_act 64x112x112: over compile | 1.400")
    assert main([str(tmp_path / "nothing")]) == 2
    fill(stored, compiled=1.2)
    assert main(arguments) == 0
    with (new / "search.jsonl").open("a") as file:
        file.write('{"key": "b", "n"')
    (new / "kernels.json").unlink()
    assert main([*arguments, "--partial"]) == 0
    assert main(arguments) == 1
    assert "| masked_affine_act 64x112x112: over compile | 1.200 (1.188 to 1.212) |  | missing |" in page.read_text()
    capsys.readouterr()


def test_a_budget_that_is_missed_fails(bench: Bench, tmp_path: Path) -> None:
    fill(bench)
    other = Bench(bench.device, "9.0", "h100", tmp_path / "other", tmp_path, say=lambda line: None)
    fill(other, speedup=1.99, status="over_budget")
    verdicts = compare(metrics(bench.folder), metrics(other.folder))
    assert verdicts["resnet50 fp16 batch 64 2x: budget"] == "budget missed"
    assert all(v not in FAILURES for name, v in verdicts.items() if "budget" not in name and "half" not in name)


def test_a_kernel_that_takes_the_gpu_down_keeps_no_other_from_being_timed() -> None:
    """Nothing runs in its process any more: the next one begins with what was not tried, and ends with the culprit."""
    from benchmarks import kernels
    from benchmarks.gpu_sections.kernels import AGAIN

    assert kernels.AGAIN == AGAIN
    got = {"us": {"kernel": 1.0}, "of_copy_bandwidth": 0.9, "times_eager": ratio(3.0), "times_compile": ratio(1.0)}
    done: dict[str, Any] = {"cases": {}, "failed": {}}
    saved: list[dict[str, Any]] = []
    tried: list[str] = []

    def process(culprit: str) -> int:
        lost: list[str] = []

        def take(make: Any) -> dict[str, Any]:
            tried.append(make())
            if make() == culprit or lost:
                lost.append(make())
                raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")
            return got

        named = {name: lambda name=name: name for name in ("a", "b", "c", "d")}
        return kernels.fill(done, named, take, lambda: saved.append(copy.deepcopy(done)), lambda: bool(lost))  # type: ignore[arg-type]

    assert process("b") == AGAIN and (sorted(done["cases"]), tried) == (["a"], ["a", "b"])
    assert saved[2]["failed"] == {"b": kernels.UNFINISHED}, "what ends the process itself is known by then"
    assert process("b") == 1, "all were tried: it would go on so for ever"
    assert tried == ["a", "b", "c", "d", "b"] and sorted(done["cases"]) == ["a", "c", "d"]
    assert done["failed"] == {"b": "RuntimeError: CUDA error: an illegal memory access was encountered"}
    assert process("none") == 0 and done["failed"] == {} and sorted(done["cases"]) == ["a", "b", "c", "d"]


def test_an_engines_row_is_made_as_on_a_gpu(tmp_path: Path) -> None:
    """The section's own code, on the one device that is here and a small network, in the process that it starts."""
    from benchmarks.gpu_sections import engines

    bench = Bench("this CPU", None, "cpu", tmp_path, tmp_path, quick=True)  # type: ignore[arg-type]
    row = engines.apart(bench, "resnet20", "onnxruntime", "fp32", 2, (32, 32))
    assert row["macs"] > 2 and row["dense_ms"] > 0 < row["pruned_ms"]
    assert row["realisation"] == pytest.approx(row["speedup"]["value"] / row["macs"])
    assert "not for a CPU" in engines.apart(bench, "resnet20", "tensorrt_rtx", "fp32", 2)["skipped"]
    (tmp_path / "machine.json").write_text(
        '{"device": "x", "compute_capability": "", "driver": "", "quick": true, "versions": {}}'
    )
    bench.case("engines", "a", lambda: row)
    assert "half as wide" in render(bench)


def test_an_engine_that_takes_its_process_down_costs_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu_sections import engines

    bench = Bench("this CPU", None, "cpu", tmp_path, tmp_path, quick=True, say=lambda line: None)  # type: ignore[arg-type]
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\nif 'benchmarks.gpu_sections.engines' in ' '.join(sys.orig_argv): os.abort()"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    bench.case("engines", "a", lambda: engines.apart(bench, "resnet20", "onnxruntime", "fp32", 2))
    (row,) = bench.rows("engines")
    assert row["error"] == "BadInput: onnxruntime: its process was killed by SIGABRT: it said nothing"
    about = {"device": "this CPU", "capability": None, "target": "cpu", "quick": True}
    engines.answer({"bench": about, "case": ["no such network", "onnxruntime", "fp32", 2, [32, 32]]}, tmp_path / "row")
    assert json.loads((tmp_path / "row").read_text())["error"].startswith("BadInput: --model no such network")


def test_a_search_that_did_without_the_kernel_is_no_row_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu_sections import search

    line = "passdeploy: the search does without its CUDA kernel: wrong"

    def ran(words: list[str], **given: Any) -> subprocess.CompletedProcess[str]:
        found = {"step_ratio": ratio(1.1), "search_step_s": 0.11, "plain_step_s": 0.1}
        Path(words[words.index("--out") + 1]).write_text(json.dumps(found))
        return subprocess.CompletedProcess(words, 0, "", line + "\n")

    monkeypatch.setattr(search.subprocess, "run", ran)
    assert search.cost("resnet18", 64, 6, kernels=False)["kernels"] is False
    with pytest.raises(RuntimeError, match=line):
        search.cost("resnet18", 64, 6, kernels=True)


def test_a_loop_that_fails_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory in the plain step would otherwise last until the machine is given back."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    turns = importlib.import_module("search_cost").Turns(("search", "plain"), steps=2, pairs=3, warm=1)

    def search() -> None:
        step = turns.progress(0)
        for done in range(20):
            step(done, 20, "searching")

    searching = threading.Thread(target=search, daemon=True)
    searching.start()
    turns.enter(1)  # and goes no further
    assert searching.is_alive()
    turns.end()
    searching.join(timeout=20)
    assert not searching.is_alive()


def test_the_run_is_spelt_as_the_command_line_takes_it(bench: Bench, tmp_path: Path) -> None:
    import typer

    words = command(bench, "resnet50", ("1.5x", "2x"), tmp_path)
    assert words[1:4] == ["-m", "passdeploy", "run"]
    parsed = typer.main.get_command(app).commands["run"].make_context("run", words[4:])  # type: ignore[attr-defined]
    assert (parsed.params["latency"], parsed.params["batch"], parsed.params["target"]) == ("1.5x,2x", 64, "h100")


def test_generated_pictures_can_be_told_apart() -> None:
    from benchmarks.gpu_sections.pictures import _split

    split = _split(40, 0)
    images = split.images(torch.arange(40))
    assert images.shape == (40, 3, 224, 224)
    spectra = torch.fft.rfft2(images.mean(1) - images.mean((1, 2, 3))[:, None, None]).abs()
    strongest = spectra.flatten(1).argmax(1)
    assert torch.equal(strongest[:10], strongest[10:20]), "a class has its frequency"
    assert len(set(strongest[:10].tolist())) == 10


def test_rows_of_other_software_are_not_taken_for_todays(bench: Bench) -> None:
    before = json.loads((bench.folder / "machine.json").read_text()) | {"cuda": "13.0"}
    (bench.folder / "machine.json").write_text(json.dumps(before))
    newer = before | {"driver": "590.2", "versions": {"torch": "2.14.0"}}
    assert other_software(bench.folder, newer) is None, "there are no rows yet"
    fill(bench)
    assert other_software(bench.folder, newer) == "driver 580.1, torch 2.13.0"
    more = before | {"versions": {"torch": "2.13.0", "tensorrt": "10.13"}}
    assert other_software(bench.folder, before) is other_software(bench.folder, more) is None
