from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from passdeploy.engines.base import Engine, get_backend
from passdeploy.engines.files import load_engine, save_engine
from passdeploy.errors import BadInput
from tests.engines.conftest import A100, CPU

ENGINE = Engine("onnxruntime", bytes(range(256)) * 4, ".onnx", {"precision": "fp32", "batch": 1, "inputs": {"x": [1]}})


def one_line_about(error: pytest.ExceptionInfo[BadInput], *words: str) -> None:
    text = str(error.value)
    assert "\n" not in text
    for word in words:
        assert word in text


def test_round_trip_by_file_json_and_folder(tmp_path: Path) -> None:
    path = save_engine(ENGINE, tmp_path / "a" / "b")
    assert path.name == "engine.onnx" and path.read_bytes() == ENGINE.data
    for given_path in (path, path.parent / "engine.json", path.parent):
        assert load_engine(given_path) == ENGINE


def test_saving_again_replaces_and_leaves_nothing_behind(tmp_path: Path) -> None:
    save_engine(ENGINE, tmp_path)
    other = Engine("onnxruntime", b"other", ".onnx", {"batch": 2})
    save_engine(other, tmp_path)
    assert load_engine(tmp_path) == other
    assert sorted(p.name for p in tmp_path.iterdir()) == ["engine.json", "engine.onnx"]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, len(ENGINE.data) - 1), change=st.integers(1, 255))
def test_any_changed_byte_is_refused(tmp_path: Path, at: int, change: int) -> None:
    path = save_engine(ENGINE, tmp_path)
    data = bytearray(ENGINE.data)
    data[at] ^= change
    path.write_bytes(bytes(data))
    with pytest.raises(BadInput) as error:
        load_engine(path)
    one_line_about(error, str(path), "SHA-256", "compile it again")


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(length=st.integers(0, len(ENGINE.data) - 1))
def test_truncated_is_refused(tmp_path: Path, length: int) -> None:
    path = save_engine(ENGINE, tmp_path)
    path.write_bytes(ENGINE.data[:length])
    with pytest.raises(BadInput) as error:
        load_engine(path)
    one_line_about(error, str(path), f"{length} bytes", "truncated")


def test_missing_parts(tmp_path: Path) -> None:
    path = save_engine(ENGINE, tmp_path)
    path.unlink()
    with pytest.raises(BadInput) as error:
        load_engine(tmp_path)
    one_line_about(error, "engine.onnx", "cannot be read")
    path.write_bytes(ENGINE.data)
    (tmp_path / "engine.json").unlink()
    with pytest.raises(BadInput) as error:
        load_engine(path)
    one_line_about(error, "engine.json", "compile it again")


@pytest.mark.parametrize(
    "change",
    [
        {"schema": "passdeploy.engine/9"},
        {"sha256": None},
        {"bytes": "many"},
        {"meta": []},
        {"file": "../engine.onnx"},
        {"file": "/etc/passwd"},
    ],
)
def test_malformed_description(tmp_path: Path, change: dict[str, object]) -> None:
    save_engine(ENGINE, tmp_path)
    facts = json.loads((tmp_path / "engine.json").read_text())
    (tmp_path / "engine.json").write_text(json.dumps(facts | change))
    with pytest.raises(BadInput) as error:
        load_engine(tmp_path)
    one_line_about(error, "engine.json")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"schema": 1}', "\x00\xff"])
def test_description_that_is_no_description(tmp_path: Path, text: str) -> None:
    save_engine(ENGINE, tmp_path)
    (tmp_path / "engine.json").write_text(text)
    with pytest.raises(BadInput) as error:
        load_engine(tmp_path)
    one_line_about(error, "engine.json")


def test_another_file_beside_the_engine_is_not_taken_for_it(tmp_path: Path) -> None:
    save_engine(ENGINE, tmp_path)
    other = tmp_path / "other.onnx"
    other.write_bytes(b"x")
    with pytest.raises(BadInput) as error:
        load_engine(other)
    one_line_about(error, "other.onnx", "engine.onnx")


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput) as error:
        save_engine(ENGINE, tmp_path / "file" / "sub")
    one_line_about(error, "cannot be written")


@pytest.mark.parametrize(("backend", "target"), [("onnxruntime", CPU), ("tensorrt_rtx", A100)])
def test_an_engine_of_another_backend_is_refused(backend: str, target: object) -> None:
    other = Engine("openvino", b"", ".onnx", {"precision": "fp32", "batch": 1})
    with pytest.raises(BadInput) as error:
        get_backend(backend).runner(other, target)  # type: ignore[arg-type]
    one_line_about(error, "openvino", backend)
