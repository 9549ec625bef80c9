from __future__ import annotations

import csv

import pytest

from passdeploy.errors import BadInput
from passdeploy.latency.log import MeasurementLog, write_csv


def take(values):
    iterator = iter(values)
    return lambda: {"ms": next(iterator), "ratio": {"low": 1.0}, "samples": [1, 2]}


def never():
    raise AssertionError("was measured again")


def test_replay_gives_the_values_back_in_order(tmp_path):
    path = tmp_path / "log.jsonl"
    log = MeasurementLog(path)
    source = take([1.0, 2.0, 3.0])
    first = [log.measure("fit", "a", "cpu", source).value["ms"] for _ in range(2)]
    log.measure("fit", "b", "cpu", source)
    again = MeasurementLog(path)
    assert [again.measure("fit", "a", "cpu", never).value["ms"] for _ in range(2)] == first == [1.0, 2.0]
    assert again.measure("fit", "b", "cpu", never).value["ms"] == 3.0
    assert again.replayed == 3 and again.measured == 0
    assert again.measure("fit", "a", "cpu", take([9.0])).repeat == 2
    # other purpose, other target: their own measurements
    assert again.measure("bench", "a", "cpu", take([5.0])).value["ms"] == 5.0
    assert again.measure("fit", "a", "gpu", take([6.0])).value["ms"] == 6.0
    assert len(MeasurementLog(path).records) == 6


@pytest.mark.parametrize("tail", [b'{"purpose": "fit", "dig', b"\0" * 40, b"\0" * 40 + b"\n"])
def test_a_torn_last_line_is_dropped_and_overwritten(tmp_path, tail):
    path = tmp_path / "log.jsonl"
    MeasurementLog(path).measure("fit", "a", "cpu", take([1.0]))
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    log = MeasurementLog(path)
    assert len(log.records) == 1 and log.measure("fit", "a", "cpu", never).value["ms"] == 1.0
    log.measure("fit", "b", "cpu", take([2.0]))
    assert path.read_bytes().startswith(whole) and len(MeasurementLog(path).records) == 2


def test_every_cut_of_the_file_loses_at_most_the_last_record(tmp_path):
    path = tmp_path / "log.jsonl"
    log, source = MeasurementLog(path), take([1.0, 2.0, 3.0])
    for digest in "abc":
        log.measure("fit", digest, "cpu", source)
    data = path.read_bytes()
    for cut in range(len(data)):
        path.write_bytes(data[:cut])
        assert len(MeasurementLog(path).records) == data[:cut].count(b"\n")


def test_damage_in_the_middle_is_refused_by_line(tmp_path):
    path = tmp_path / "log.jsonl"
    log, source = MeasurementLog(path), take([1.0, 2.0, 3.0])
    for digest in "abc":
        log.measure("fit", digest, "cpu", source)
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], b"oops", *lines[2:]]))
    with pytest.raises(BadInput, match="line 2"):
        MeasurementLog(path)


def test_a_failed_measurement_is_not_logged(tmp_path):
    log = MeasurementLog(tmp_path / "log.jsonl")
    with pytest.raises(AssertionError):
        log.measure("fit", "a", "cpu", never)
    record = log.measure("fit", "a", "cpu", take([1.0]))
    assert record.repeat == 0 and len(log.records) == 1


def test_seconds_are_the_logged_ones(tmp_path):
    now = iter([0.0, 2.5])
    log = MeasurementLog(tmp_path / "log", clock=lambda: next(now))
    assert log.measure("fit", "a", "cpu", take([1.0])).seconds == 2.5
    assert MeasurementLog(tmp_path / "log").measure("fit", "a", "cpu", never).seconds == 2.5


def test_csv(tmp_path):
    log, source = MeasurementLog(), take([1.0, 2.0])
    log.measure("fit", "a", "cpu", source)
    log.measure("fit", "b", "cpu", source)
    (tmp_path / "m.csv.tmp").write_text("somebody else's")
    write_csv(log.records, tmp_path / "m.csv")
    assert (tmp_path / "m.csv.tmp").read_text() == "somebody else's"
    with (tmp_path / "m.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [r["ms"] for r in rows] == ["1.0", "2.0"] and rows[0]["ratio.low"] == "1.0" and "samples" not in rows[0]
