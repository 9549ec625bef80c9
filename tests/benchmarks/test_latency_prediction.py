"""The latency model on measurements from before."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MEASURED = ROOT / "benchmarks" / "results" / "amd-epyc-avx-512" / "latency-prediction"


def test_todays_model_predicts_what_was_measured_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for end in ("json", "log.jsonl"):
        shutil.copy(MEASURED / f"resnet20-32-openvino.{end}", tmp_path)
    monkeypatch.delitem(sys.modules, "latency_prediction", raising=False)
    from latency_prediction import refit  # type: ignore[import-not-found]

    ((name, was, now),) = refit(tmp_path)
    assert name == "resnet20-32-openvino"
    assert now["mape"] < 0.012 and now["max_ape"] < 0.05, (was, now)  # repeats lie 0.8 % apart
