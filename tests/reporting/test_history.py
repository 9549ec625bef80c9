from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from passdeploy.errors import BadInput
from passdeploy.reporting.comparison import by_setting, render_comparison, row_names
from passdeploy.reporting.files import parse_report, write_reports
from passdeploy.reporting.history import history, pareto_front, render_history, trends
from passdeploy.reporting.plots.plane import Mark, pareto
from passdeploy.reporting.plots.trend import trend
from passdeploy.reporting.schema import Report
from tests.reporting.variants import data, runs, variant


def test_one_row_per_report_the_oldest_first(tmp_path: Path) -> None:
    for index, report in enumerate(reversed(runs())):
        write_reports(report, tmp_path / str(index))
    frame = history([tmp_path])
    assert list(frame["commit"]) == ["0f1c2ab", "1f1c2ab", "2f1c2ab", "3f1c2ab", "4f1c2ab"]
    assert list(frame["speedup"]) == [1.534, 2.068, 3.071, 2.031, 2.912]
    assert frame["pruned_ms"].iloc[1] == pytest.approx(0.5814 / 2.068)
    assert history([tmp_path / "0" / "report.json", tmp_path / "1"])["method"].tolist() == ["l1", "l1"]


def test_the_front_holds_what_nothing_beats() -> None:
    front = pareto_front(history(runs()))
    assert list(zip(front["method"], front["budget"], strict=True)) == [
        ("pass", "3x"),
        ("pass", "2x"),
        ("pass", "1.5x"),
    ]


def test_runs_on_other_settings_do_not_compete() -> None:
    d = data()
    d["target"]["threads"] = 2
    d["pruned"]["accuracy"] = 0.5
    front = pareto_front(history([variant("within_budget"), parse_report(d), variant("unverified")]))
    assert sorted(front["threads"]) == [1, 2]


def test_a_trend_joins_runs_of_one_configuration() -> None:
    d = data()
    d["provenance"].update(created="2026-12-01T00:00:00+00:00", commit="bbbbbbb")
    d["speedup"]["latency"] = 2.2
    frame = history([*runs(), parse_report(d)])
    lines = trends(frame)
    assert len(lines) == 5
    assert lines["resnet20 cpu pass 2x"]["speedup"].tolist() == [2.068, 2.2]
    page = render_history(frame)
    assert "6 runs, 5 configurations" in page
    assert "bbbbbbb" in page


def test_a_tree_with_changes_is_not_shown_as_its_commit() -> None:
    d = data()
    d["provenance"]["commit"] = "b" * 40 + "+"
    page = render_history(history([parse_report(d), *runs()]))
    assert f"<th>{'b' * 10}+</th>" in page
    assert "<th>0f1c2ab</th>" in page


def test_the_trend_of_one_run_has_no_negative_latencies() -> None:
    figure = str(trend("latency, ms", ["0f1c2ab"], {"resnet20": [0.28]}))
    assert re.findall(r">(-[\d.]+)<", figure) == []
    assert ">0.0<" in figure


def test_other_devices_are_other_lines_in_other_figures() -> None:
    d = data()
    d["target"] |= {"device": "another CPU", "threads": 8}
    d["seed"] = 7
    names = list(trends(history([variant("within_budget"), parse_report(d)])))
    device = variant("within_budget").target.device
    assert names == [
        f"resnet20 cpu pass 2x {device} threads 1 seed 0",
        "resnet20 cpu pass 2x another CPU threads 8 seed 7",
    ]
    page = render_history(history([variant("within_budget"), parse_report(d)]))
    assert page.count("<h2>Over time</h2>") == 2


def test_reports_without_provenance_or_latency_are_rows_too() -> None:
    d = variant("unverified").to_json()
    del d["provenance"]
    frame = history([parse_report(d), *runs()])
    assert frame["pruned_ms"].isna().sum() == 1
    assert len(pareto_front(frame)) == 3
    assert "6 runs" in render_history(frame)


def test_nothing_to_show_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no reports"):
        history([])
    with pytest.raises(BadInput, match=r"no report\.json"):
        history([tmp_path])
    with pytest.raises(BadInput, match="no such run folder"):
        history([tmp_path / "missing"])
    with pytest.raises(BadInput, match="nothing to compare"):
        render_comparison([])


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=30))
def test_pareto_by_definition(points: list[tuple[int, int]]) -> None:
    marks = [Mark("", "pruned", float(x), float(y)) for x, y in points]
    front = {(m.x, m.y) for m in pareto(marks)}
    beaten = {(m.x, m.y) for m in marks if any(o.x <= m.x and o.y >= m.y and (o.x, o.y) != (m.x, m.y) for o in marks)}
    assert front == {(m.x, m.y) for m in marks} - beaten


def test_rows_are_named_by_what_differs() -> None:
    assert row_names(runs()) == ["pass 1.5x", "pass 2x", "pass 3x", "l1 2x", "l1 3x"]
    assert row_names(runs()[:3]) == ["1.5x", "2x", "3x"]
    first = runs()[0]
    target = first.target.model_copy(update={"precision": "int8", "batch": 8})
    whole = first.budget.model_copy(update={"scope": "end_to_end"})
    others = [first.model_copy(update={"target": target}), first.model_copy(update={"budget": whole})]
    assert row_names([first, *others]) == [
        "1.5x fp32 batch 1 engine", "1.5x int8 batch 8 engine", "1.5x fp32 batch 1 end to end"
    ]  # fmt: skip
    assert len(by_setting([first, *others])) == 3
    frame = history([first, others[1]])
    assert len(pareto_front(frame)) == 2, "of different things"


def test_runs_of_one_configuration_can_be_told_apart() -> None:
    def again(**changes: str) -> Report:
        d = data()
        d["provenance"] |= {"commit": "a" * 40, "created": "2026-12-01T08:30:00+00:00"} | changes
        return parse_report(d)

    def rows(*reports: Report) -> list[str]:
        table = render_comparison(reports, "md").splitlines()
        return [line.split(" | ")[1] for line in table if line.startswith("| ✅")]

    first = again()
    assert rows(first, again(commit="b" * 40)) == ["2x aaaaaaa", "2x bbbbbbb"]
    assert rows(first, again(commit="a" * 40 + "+")) == ["2x aaaaaaa", "2x aaaaaaa+"]
    later = again(created="2026-12-02T09:00:00+00:00")
    assert rows(first, later) == ["2x 2026-12-01 08:30:00", "2x 2026-12-02 09:00:00"]
    elsewhere = first.model_copy(update={"target": first.target.model_copy(update={"device": "another CPU"})})
    assert rows(first, elsewhere)[1] == "2x another CPU"
    assert rows(first, first) == ["2x #1", "2x #2"]


def test_metrics_and_data_never_share_a_plane() -> None:
    d = data()
    d["provenance"] |= {"metric": "mean IoU", "data": "streets"}
    first, second = by_setting([*runs(), parse_report(d)]).items()
    assert (len(first[1]), len(second[1])) == (5, 1)
    assert first[0].endswith("; top-1 accuracy on Fashion-MNIST") and second[0].endswith("; mean IoU on streets")


def test_devices_never_share_an_axis() -> None:
    settings = by_setting([*runs(), variant("unverified")])
    assert [len(members) for members in settings.values()] == [5, 1]
    page = render_comparison([*runs(), variant("unverified")], names=list("abcdef"))
    assert page.count("<h2>Accuracy and latency</h2>") == 1, "nothing was measured on the second device"
    assert "<th>f</th>" in page
