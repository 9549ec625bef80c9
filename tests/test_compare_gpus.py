"""Runs of a comparison side by side, in processes that see a GPU each. The GPUs are made up, the processes are not."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

import pytest
import torch

from passdeploy.compare import parallel
from passdeploy.compare.command import compare
from passdeploy.compare.parallel import chosen_gpus
from passdeploy.compare.rows import Row, RowFile
from passdeploy.compare.runner import Plan, arms_of, missing
from passdeploy.config import make_config
from passdeploy.data.base import ArraySplit
from passdeploy.errors import BadInput
from passdeploy.subject import load_subject
from tests import scripted
from tests.test_compare import CONFIG, ROW

ROOT = Path(__file__).parents[1]


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "attached_gpus", lambda: ("NVIDIA A100", "NVIDIA A100"))
    monkeypatch.setattr(parallel, "undisturbed", lambda target: True)  # what runs here is scripted, for a CPU
    monkeypatch.setattr(parallel, "WORKER", (sys.executable, "-m", "tests.comparing"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def worker(body: str) -> tuple[str, ...]:
    """One that knows its job and does as it is told."""
    return (sys.executable, "-c", f"import json, os, sys; job = json.load(sys.stdin); {body}")


def test_gpus_by_number(two_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert chosen_gpus("all") == ("0", "1")
    assert chosen_gpus("1") == ("1",)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, GPU-7ab")
    assert chosen_gpus("1,0") == ("GPU-7ab", "5")
    for wrong in ("2", "0,0", "a", ""):
        with pytest.raises(BadInput, match="from 0 to 1"):
            chosen_gpus(wrong)
    monkeypatch.setattr(parallel, "attached_gpus", lambda: ("NVIDIA A100", "NVIDIA T4"))
    assert chosen_gpus("0") == ("5",)
    with pytest.raises(BadInput, match="NVIDIA A100 and NVIDIA T4 can't be compared"):
        chosen_gpus("all")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(parallel, "attached_gpus", lambda: ("NVIDIA T4", "NVIDIA A100", "NVIDIA A100"))
    with pytest.raises(BadInput, match=r"NVIDIA T4, not NVIDIA A100.*CUDA_VISIBLE_DEVICES=1,2 and --gpus all"):
        chosen_gpus("1,2")
    monkeypatch.setattr(parallel, "attached_gpus", lambda: ())
    with pytest.raises(BadInput, match="no NVIDIA GPU is attached"):
        chosen_gpus("all")


def test_side_by_side_is_as_one_after_the_other(
    two_gpus: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    config = make_config(CONFIG)
    outcome = compare(config, "l1,uniform", "0", tmp_path / "two", gpus="0,1")
    alone = compare(config, "l1,uniform", "0", tmp_path / "one", data=scripted.data())
    assert outcome.failed == {}

    def told(rows: list[Row]) -> set[tuple[object, ...]]:
        return {(row.method, row.split, row.accuracy, row.ratio, row.steps, row.settings) for row in rows}

    assert told(outcome.rows) == told(alone.rows) and len(outcome.rows) == 4
    plan = Plan(
        config, arms_of(["l1", "uniform"]), (0, 1), tmp_path / "two", RowFile(tmp_path / "two" / "compare.jsonl")
    )
    assert [(arm.name, seed) for arm, seed in missing(plan)] == [("l1", 1), ("uniform", 1)]


def test_a_process_that_dies_is_a_run_that_failed(
    two_gpus: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = "raise SystemExit(os.environ['CUDA_VISIBLE_DEVICES'])"
    monkeypatch.setattr(parallel, "WORKER", worker(f"print('{{}}') if job['only_share'] else exec({body!r})"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    outcome = compare(make_config(CONFIG), "l1", "0", tmp_path, gpus="1")
    assert outcome.failed == {"l1, seed 0": "its process ended with 1: 1"}, "it saw the second GPU only"
    assert outcome.rows == []


def test_what_cannot_be_shared_fails_its_seed_only_and_is_made_on_the_first_gpu(
    two_gpus: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = "raise SystemExit('diverged on ' + os.environ['CUDA_VISIBLE_DEVICES'])"
    monkeypatch.setattr(parallel, "WORKER", worker(f"exec({body!r}) if job['seed'] == 1 else print('{{}}')"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    outcome = compare(make_config(CONFIG), "l1,uniform", "0,1", tmp_path, gpus="1,0")
    reason = "what the runs of seed 1 share: its process ended with 1: diverged on 1"
    assert outcome.failed == {"l1, seed 1": reason, "uniform, seed 1": reason}


def test_objects_stay_in_one_process(two_gpus: None, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="give them by name"):
        compare(make_config(CONFIG), "l1", "0", tmp_path, gpus="all", data=scripted.data())


def test_runs_on_a_cpu_are_not_side_by_side(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What trains there is in the latencies of what is measured."""
    monkeypatch.setattr(parallel, "attached_gpus", lambda: ("NVIDIA A100", "NVIDIA A100"))
    with pytest.raises(BadInput, match="--gpus with --target cpu"):
        compare(make_config(CONFIG), "l1", "0", tmp_path, gpus="all")
    assert not list(tmp_path.rglob("dense"))


def test_data_without_test_images_is_refused_before_anything_starts(
    two_gpus: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = scripted.data()
    nothing = ArraySplit(whole.test.images(torch.arange(0)).byte(), whole.test.labels[:0])
    subject = load_subject(make_config(CONFIG), data=dataclasses.replace(whole, test=nothing))
    monkeypatch.setattr(Plan, "subject", subject)
    monkeypatch.setattr(parallel, "WORKER", worker("raise SystemExit('started')"))
    with pytest.raises(BadInput, match="no test images"):
        compare(make_config(CONFIG), "l1", "0", tmp_path, gpus="all")


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_rows_of_several_processes_are_all_there(tmp_path: Path, suffix: str) -> None:
    path, children = tmp_path / f"rows{suffix}", []
    for child in range(4):
        pid = os.fork()
        if pid == 0:
            for turn in range(20):
                RowFile(path).append([dataclasses.replace(ROW, seed=100 * child + turn)])
            os._exit(0)
        children.append(pid)
    assert all(os.waitpid(pid, 0)[1] == 0 for pid in children)
    assert len(RowFile(path).read()) == 80
