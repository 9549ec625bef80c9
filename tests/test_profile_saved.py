"""A latency model that is saved as a file: measured anew, whatever the configuration reads one from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from passdeploy.api import save_profile
from passdeploy.config import make_config, merge
from passdeploy.errors import BadInput
from passdeploy.latency.model import LatencyModel
from passdeploy.pipeline import Run
from tests import scripted

pytestmark = pytest.mark.usefixtures("exported_once")

VALUES = {**scripted.SETTINGS, "model": "tiny-resnet", "data": "stripes"}


def test_a_backend_that_cannot_run_engines_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scripted.Scripted, "runnable", lambda *_: "the driver is missing")
    with pytest.raises(BadInput, match=r"nothing can be measured here \(the driver is missing\)") as refused:
        save_profile(make_config(VALUES), tmp_path / "run", tmp_path / "p.json", quiet=True)
    assert "attached" not in str(refused.value)


def test_the_file_may_be_the_one_that_runs_read(tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    config = make_config(merge(VALUES, {"profile_file": str(file), "profile": {"structures": 9}}))
    assert save_profile(config, tmp_path / "run", file, quiet=True)["kind"] == "measured"
    assert save_profile(config, tmp_path / "again", file, quiet=True)["kind"] == "measured"
    assert (tmp_path / "again" / "profile" / "measurements.jsonl").exists(), "measured anew, not copied"


def test_a_file_that_cannot_be_written_is_said_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Run, "shared", lambda *_: pytest.fail("measured"))
    (tmp_path / "file").write_text("")
    for save, wanted in ((tmp_path / "file" / "p.json", "cannot be written"), (tmp_path, "is a folder")):
        with pytest.raises(BadInput, match=f"--save .*{wanted}"):
            save_profile(make_config(VALUES), tmp_path / "run", save, fresh=True, quiet=True)
    assert not (tmp_path / "run").exists(), "nor is anything deleted for it"


@pytest.mark.parametrize("fresh", [False, True])
def test_a_file_in_the_run_directory_is_refused_before_anything_is_written(tmp_path: Path, fresh: bool) -> None:
    """The next call with --fresh would have to delete it, and the folder is the run's."""
    for _ in range(2):
        with pytest.raises(BadInput, match=r"--save .*lies in --out .*; give a file outside"):
            save_profile(make_config(VALUES), tmp_path / "run", tmp_path / "run" / "p.json", fresh=fresh, quiet=True)
    assert not (tmp_path / "run").exists()


def test_too_few_structures_say_what_to_raise() -> None:
    with pytest.raises(BadInput, match=r"8 measured structures are too few, .*; raise profile\.seconds"):
        LatencyModel.fit((), [4], np.ones((8, 1)), np.ones(8), 1.0)
