"""Budgets that one search served: their reports name each other, and the dense network is compiled once."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from passdeploy.reporting import load_report
from passdeploy.workspace import read_json
from tests import scripted

ASKED = ["2x", "50x", "5s"]


def test_each_report_has_what_all_budgets_came_to(finished: Path) -> None:
    for asked in ASKED:
        report = load_report(finished / asked / "report.json")
        assert report.budgets is not None
        assert [budget.asked for budget in report.budgets] == ASKED
        for budget in report.budgets:
            other = load_report(finished / budget.asked / "report.json")
            assert budget.status == other.status
            assert budget.speedup == other.speedup.latency
            assert budget.accuracy == (other.pruned.accuracy if other.pruned is not None else None)


def test_links_between_them_lead_somewhere(finished: Path) -> None:
    page = (finished / "2x" / "report.html").read_text(encoding="utf-8")
    section = page[page.index("All budgets of this search") :]
    links = re.findall(r'<a href="([^"#]+)"', section[: section.index("</section>")])
    assert len(links) == len(ASKED) - 1, "to the others"
    assert all((finished / "2x" / link).is_file() for link in links)
    assert "All budgets of this search" in (finished / "5s" / "report.md").read_text(encoding="utf-8")


def test_what_a_stage_wrote_and_a_bundle_sealed_is_left_alone(finished: Path) -> None:
    assert read_json(finished / "2x" / "report" / "report.json").get("budgets") is None


def test_one_budget_has_no_siblings(single: Path) -> None:
    assert load_report(single / "report.json").budgets is None


def test_the_dense_network_is_compiled_once_for_all_budgets(finished: Path) -> None:
    first, last = (finished / asked / "compile" for asked in ("2x", "5s"))
    for name in ("dense.onnx", "dense-engine/engine.json"):
        assert (first / name).samefile(last / name)
    assert not (first / "model.onnx").samefile(last / "model.onnx")


def test_a_budget_out_of_reach_does_not_bring_back_an_old_dense_graph(finished: Path, tmp_path: Path) -> None:
    """It has been within reach, of other weights: what was compiled then still lies in its folder."""
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    before = (folder / "dense.onnx").read_bytes()
    (folder / "50x" / "compile").mkdir()
    (folder / "50x" / "compile" / "dense.onnx").write_bytes(b"of other weights")
    run = scripted.start(folder, latency=",".join(ASKED))
    run.publish(run.runs[ASKED.index("50x")])
    assert (folder / "dense.onnx").read_bytes() == before
