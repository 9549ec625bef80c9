"""Data without test images: what was not measured is null, in every file, and nothing is compared by it."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from passdeploy.compare.command import compare
from passdeploy.config import make_config, merge
from passdeploy.console import Ui
from passdeploy.data.ahead import batches
from passdeploy.data.base import ArraySplit, ImageData
from passdeploy.errors import BadInput
from passdeploy.pipeline import Run
from passdeploy.reporting.files import json_schema
from passdeploy.study.command import study
from tests import scripted

pytestmark = pytest.mark.usefixtures("exported_once")


def without_tests() -> ImageData:
    data = scripted.data()
    none = ArraySplit(torch.zeros(0, 3, *scripted.SIZE, dtype=torch.uint8), torch.zeros(0, dtype=torch.long))
    return dataclasses.replace(data, test=none)


def config(**settings: Any) -> Any:
    given = {"model": "tiny-resnet", "data": "stripes", "latency": "1.3x", **settings}
    return make_config(merge({**scripted.SETTINGS, "epochs": 0.2, "search": {"epochs": 0.1, "min_steps": 21}}, given))


def test_a_run_reports_null(single: Path, tmp_path: Path) -> None:
    weights = str(single / "dense" / "dense.safetensors")
    given = config(weights=weights, alternatives=True, min_accuracy=0.1)
    running = Run(given, tmp_path / "run", Ui(quiet=True), data=without_tests())
    (report,) = running.run()
    assert report.status == "within_budget", "the floor is held against validation images"
    written = json.loads((tmp_path / "run" / "report.json").read_text())
    jsonschema.validate(written, json_schema())
    assert written["dense"]["accuracy"] is written["pruned"]["accuracy"] is None
    (int8,) = [row for row in written["alternatives"]["precisions"] if row["precision"] == "int8"]
    assert int8["accuracy"] is None and int8["latency_ms"] is not None, int8.get("reason")
    for page in ("report.html", "report.md", "bundle/MODEL_CARD.md"):
        assert not re.search(r"(?<!\d)0\.00 %", (tmp_path / "run" / page).read_text()), page


def test_a_comparison_by_them_is_refused_at_once(single: Path, tmp_path: Path) -> None:
    weights = str(single / "dense" / "dense.safetensors")
    given = config(weights=weights)
    with pytest.raises(BadInput, match=r"stripes has no test images, .*--split validation"):
        compare(given, "l1", "0", tmp_path / "refused", data=without_tests())
    outcome = compare(given, "l1", "0", tmp_path / "compared", split="validation", data=without_tests())
    assert not outcome.failed
    assert [(row.split, row.accuracy is None) for row in outcome.rows] == [("validation", False)]
    page = (tmp_path / "compared" / "compare.md").read_text()
    with pytest.raises(BadInput, match=r"stripes has no test images"):
        compare(given, "l1", "0", tmp_path / "compared", data=without_tests())
    assert (tmp_path / "compared" / "compare.md").read_text() == page, "nothing is left to run, and nothing to show"


def test_a_study_of_them_is_refused_before_it_runs(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="stripes has no test images, whose accuracies are compared"):
        study("ablation", config(), "0", tmp_path, data=without_tests())
    assert not list(tmp_path.rglob("search")), "nothing was trained"


def test_no_image_at_all_is_one_batch_less() -> None:
    data = without_tests()
    assert list(batches(data.test, 4)) == []
    assert len(data.digest()) == 64
