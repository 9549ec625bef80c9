from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from passdeploy.errors import BadInput
from passdeploy.structure import Structure

KEPT = Structure({"a": (True, False, True), "depth:b": (False,)})


def test_a_structure_goes_through_json() -> None:
    assert Structure.from_json(json.loads(json.dumps(KEPT.to_json()))) == KEPT


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema": "another/1"}, "schema is 'another/1'"),
        ({"groups": {"a": {"units": "x", "kept": [0]}}}, "malformed"),
        ({"groups": {"a": {"kept": [0]}}}, "malformed"),
        ({"groups": ["a"]}, "malformed"),
        ({"groups": {"a": {"units": 2, "kept": [2]}}}, "keeps units outside 0..1"),
    ],
)
def test_a_damaged_one_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        Structure.from_json(KEPT.to_json() | change)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "structure.json").write_text("{")
    with pytest.raises(BadInput):
        Structure.load(tmp_path / "structure.json")
