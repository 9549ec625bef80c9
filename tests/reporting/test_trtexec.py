from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from passdeploy.errors import BadInput
from passdeploy.reporting.files import parse_report
from passdeploy.reporting.html import render_html
from passdeploy.reporting.markdown import render_markdown
from passdeploy.reporting.trtexec import attach, read_trtexec
from tests.reporting.variants import data


def call(index: int, compute: float) -> dict[str, float]:
    """One entry as current versions of trtexec write it."""
    t = 10.0 * index
    return {
        "startEnqMs": t,
        "endEnqMs": t + 0.05,
        "startH2dMs": t,
        "endH2dMs": t + 0.1,
        "startComputeMs": t + 0.1,
        "endComputeMs": t + 0.1 + compute,
        "startD2hMs": t + 0.1 + compute,
        "endD2hMs": t + 0.3 + compute,
        "h2dMs": 0.1,
        "computeMs": compute,
        "d2hMs": 0.2,
        "latencyMs": compute + 0.3,
    }


def write(path: Path, calls: Any) -> Path:
    path.write_text(json.dumps(calls))
    return path


def test_percentiles_are_nearest_rank_over_the_calls(tmp_path: Path) -> None:
    times = [1 + i / 1000 for i in range(1000)]
    path = write(tmp_path / "times.json", [call(i, t) for i, t in enumerate(times)])
    engine, whole = read_trtexec(path), read_trtexec(path, "dense int8", "end_to_end")
    assert (engine.latency_ms.p50, engine.latency_ms.p90, engine.latency_ms.p99) == pytest.approx((1.499, 1.899, 1.989))
    assert whole.latency_ms.p50 == pytest.approx(1.799)
    assert (engine.label, whole.label) == ("times.json", "dense int8")
    assert engine.latency_ms.enqueue_ms == pytest.approx(0.05)
    assert engine.latency_ms.n == 1000
    assert len(engine.samples) == 500


def test_too_few_calls_say_nothing_about_high_percentiles(tmp_path: Path) -> None:
    latency = read_trtexec(write(tmp_path / "t.json", [call(i, 1.0) for i in range(20)])).latency_ms
    assert latency.p50 == 1.0
    assert latency.p99 is None


def test_entries_with_start_and_end_only_are_read(tmp_path: Path) -> None:
    calls = [{k: v for k, v in call(i, 2.0).items() if k.startswith(("start", "end"))} for i in range(20)]
    path = write(tmp_path / "t.json", calls)
    assert read_trtexec(path).latency_ms.p50 == pytest.approx(2.0)
    assert read_trtexec(path, scope="end_to_end").latency_ms.p50 == pytest.approx(2.3)
    old = [{k.replace("H2d", "In").replace("D2h", "Out"): v for k, v in c.items()} for c in calls]
    assert read_trtexec(write(path, old), scope="end_to_end").latency_ms.p50 == pytest.approx(2.3)


@pytest.mark.parametrize(
    "calls",
    [{}, [], [1], [{"foo": 1}], [call(0, 1.0), {}], [{"computeMs": "x"}], [{"computeMs": -1}], [{"computeMs": True}]],
)
def test_other_json_is_refused_in_one_line(calls: Any, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="trtexec") as caught:
        read_trtexec(write(tmp_path / "t.json", calls))
    assert "\n" not in str(caught.value)


def test_an_unreadable_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text("[")
    for name in ("t.json", "missing.json"):
        with pytest.raises(BadInput, match="cannot be read"):
            read_trtexec(tmp_path / name)


def test_an_imported_measurement_stands_in_the_report(tmp_path: Path) -> None:
    imported = read_trtexec(write(tmp_path / "t.json", [call(i, 1.25) for i in range(100)]), "dense fp16")
    page = render_html(parse_report(data() | {"imported": [imported.model_dump()]}))
    assert "Measured by other tools" in page
    assert "dense fp16" in page
    assert "1.25 ms" in page


def test_a_run_and_trtexec_stand_in_one_report(tmp_path: Path) -> None:
    path = write(tmp_path / "dense-int8.json", [call(i, 0.4) for i in range(800)])
    own = parse_report(data())
    (one,) = attach([own], [path])
    assert own.imported is None
    assert attach([own, own], []) == [own, own]
    assert one.imported is not None and [item.label for item in one.imported] == ["dense-int8.json"]
    for page in (render_markdown(one), render_html(one)):
        assert "Measured by other tools" in page
        assert "400 µs" in page
    assert "Measured by other tools" not in render_markdown(own)
    with pytest.raises(BadInput, match="--trtexec: give one run"):
        attach([own, own], [path])


def test_trtexec_is_read_in_the_scope_of_the_budget(tmp_path: Path) -> None:
    d = data()
    d["budget"]["scope"] = "end_to_end"
    (one,) = attach([parse_report(d)], [write(tmp_path / "t.json", [call(i, 1.0) for i in range(20)])])
    assert one.imported is not None
    assert (one.imported[0].scope, one.imported[0].latency_ms.p50) == ("end_to_end", pytest.approx(1.3))
