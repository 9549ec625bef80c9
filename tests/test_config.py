"""One schema behind flags, file and Python; unknown keys are refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from passdeploy.api import configure
from passdeploy.config import DEMO, differing_keys, make_config, merge
from passdeploy.config_file import load_file
from passdeploy.errors import BadInput


def test_it_round_trips_through_yaml() -> None:
    config = make_config(
        {"model": "m", "data": "d", "latency": "2x, 5ms", "input_size": [48, 40], "search": {"epochs": 0.5}}
    )
    assert config.latency == ("2x", "5ms")
    again = make_config(yaml.safe_load(yaml.safe_dump(config.to_json())))
    assert again == config
    assert differing_keys(again.to_json(), config.to_json()) == []


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({"latncy": "2x"}, r"here: unknown key 'latncy'; did you mean latency"),
        ({"search": {"temperatur": 1}}, r"unknown key 'search\.temperatur'; did you mean temperature"),
        ({"prompt": {"kind": "magic"}}, r"prompt\.kind: .*'additive'"),
        ({"epochs": float("nan")}, r"epochs"),
        ({"epochs": -1}, r"epochs"),
        ({"train_batch": 1}, r"train_batch: .*greater than or equal to 2"),
        ({"min_accuracy": 1.5}, r"min_accuracy"),
        ({"std": (0.1, 0.0, 0.1)}, r"std\.1"),
        ({"profile": {"structures": 8}}, r"profile\.structures: .*greater than or equal to 9"),
        ({"latency": "2y"}, r"unknown unit 'y'"),
        ({"search": 3}, r"search"),
        ({"epochs": True}, r"epochs: must be a number \(given: True\)"),
        ({"search": {"trials": True}}, r"search\.trials: must be a number"),
    ],
)
def test_refused(values: dict[str, object], wanted: str) -> None:
    with pytest.raises(BadInput, match=wanted) as refused:
        make_config(values, "here")
    assert "\n" not in str(refused.value)


def test_a_bare_off_of_yaml_is_off() -> None:
    assert make_config(yaml.safe_load("profile: {cache: off}"), "here").profile.cache == "off"


def test_paths_are_taken_where_names_are() -> None:
    paths = {"weights": Path("w.pth"), "data": Path("photos"), "profile_file": Path("p.json")}
    assert make_config(paths) == make_config({key: str(path) for key, path in paths.items()})


def test_flags_win_over_the_file_section_by_section(tmp_path: Path) -> None:
    base = {"seed": 1, "search": {"epochs": 2, "ramp": 0.5}}
    assert merge(base, {"search": {"ramp": 0.1}, "batch": 4}) == {
        "seed": 1,
        "search": {"epochs": 2, "ramp": 0.1},
        "batch": 4,
    }
    file = tmp_path / "a.yaml"
    file.write_text("model: m\ndata: d\nlatency: 3x\nseed: 5\n")
    config, note = configure(file, {"latency": "2x"})
    assert (config.latency, config.seed, note) == (("2x",), 5, None)


def test_what_is_used_when_nothing_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config, note = configure(None, {"latency": "2x"})
    assert (config.model, config.data) == (DEMO["model"], DEMO["data"])
    assert note is not None
    assert "embedded demo" in note
    (tmp_path / "passdeploy.yaml").write_text("model: m\ndata: d\n")
    config, note = configure(None, {})
    assert config.model == "m"
    assert note == "Configuration: ./passdeploy.yaml"
    for lonely, other in (("model", "data"), ("data", "model")):
        (tmp_path / "passdeploy.yaml").write_text(f"{lonely}: x\n")
        with pytest.raises(BadInput, match=f"--{other} is missing"):
            configure(None, {})


def test_an_empty_file_is_no_configuration(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("")
    assert load_file(tmp_path / "a.yaml") == {}


@pytest.mark.parametrize("text", ["a: [", "data: 2024-02-30"])
def test_what_is_no_yaml_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "b.yaml").write_text(text)
    with pytest.raises(BadInput, match="not valid YAML") as refused:
        load_file(tmp_path / "b.yaml")
    assert "\n" not in str(refused.value)


def test_differing_keys_are_dotted() -> None:
    a = {"x": 1, "s": {"p": 1, "q": 2}, "only_a": None}
    b = {"x": 1, "s": {"p": 1, "q": 3}, "only_b": 2}
    assert differing_keys(a, b) == ["only_b", "s.q"]


def test_the_demo_says_which_file_was_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert str(configure(None, {})[1]).startswith("No model, data or configuration file given")
    (tmp_path / "passdeploy.yaml").write_text("latency: 3x\n")
    config, note = configure(None, {})
    assert config.latency == ("3x",)
    assert str(note).startswith("passdeploy.yaml names neither model nor data: the embedded demo is used")


def test_nothing_behind_a_key_asks_for_the_default() -> None:
    """A section whose lines are commented out, or batch=None from Python."""
    values = {
        "model": "m",
        "data": "d",
        "batch": None,
        "search": None,
        "finetune": {"lr": None},
        "groups": {"exclude": None},
    }
    assert make_config(values) == make_config({"model": "m", "data": "d"})
    with pytest.raises(BadInput, match=r"unknown key 'finetune\.no'"):
        make_config({**values, "finetune": {"no": None}})
