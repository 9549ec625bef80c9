"""The command line: what can't be used is refused in one line that says what to do, and nothing is lost by it."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from passdeploy import cli
from passdeploy.dependencies import version
from tests import scripted

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "tests" / "reporting" / "example.json"
VERBS = (
    "run", "profile", "search", "fit", "finetune", "compile", "bench", "report", "ship", "compare", "groups", "targets",
    "doctor", "verify",
)  # fmt: skip


@dataclass
class Said:
    code: int
    out: str
    err: str

    def line(self) -> str:
        """The error: exactly one line on stderr, nothing else anywhere."""
        assert self.out == ""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("error: ")
        assert "Traceback" not in self.err
        return lines[0]


Call = Callable[..., Said]


@pytest.fixture
def passdeploy(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Call:
    """Calls the command line in this process, in an empty working directory."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)

    def call(*arguments: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["passdeploy", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        return Said(int(end.value.code or 0), out, err)

    return call


def refused(passdeploy: Call, tmp_path: Path, *arguments: object, base: bool = True) -> str:
    """The line with which a run is refused; its run directory must be free for the corrected command."""
    out = tmp_path / "out"
    good = ("--model", "tiny-resnet", "--data", "stripes", "--backend", "scripted") if base else ()
    said = passdeploy("run", *good, "--out", out, *arguments)
    assert said.code == 2, said
    assert not out.exists() or not list(out.iterdir())
    return said.line()


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--model", "tiny-resnt"], r"--model tiny-resnt: .*did you mean tiny-resnet"),
        (["--model", "mobilenet_v"], r"mobilenet_v2"),
        (["--model", "nothere:build"], r"no module 'nothere' on the path or in "),
        (["--model", "net.onnx"], r"is the name of a file; give .* module:function .*--weights"),
        (["--model", "nets.py:build"], r"nets\.py is a path, not a module; give nets:build"),
        (["--seed", "-1"], r"--seed: .*greater than or equal to 0"),
        (["--seed", "1764367200000000000"], r"--seed: .*less than or equal to 4294967295"),
        (["--model", "json:nope"], r"json has no function 'nope'"),
        (["--data", "fashion-mnit"], "did you mean fashion-mnist"),
        (["--data", "no/such/folder"], r"no such data set or folder"),
        (["--target", "a1000"], r"did you mean a100"),
        (["--backend", "onnxruntim"], r"did you mean onnxruntime"),
        (["--backend", "tensorrt"], r"not for a CPU"),
        (["--method", "pss"], r"did you mean pass\?"),
        (["--latency", "5"], r"no unit; give a time with its unit \(5ms"),
        (["--latency", "0ms"], r"above zero"),
        (["--latency", "-2ms"], r"above zero"),
        (["--latency", "nanms"], r"finite number"),
        (["--latency", "infms"], r"finite number"),
        (["--latency", "nan"], r"give a time with its unit"),
        (["--latency", "fast"], r"not a latency"),
        (["--latency", ""], r"nothing given"),
        (["--latency", "5parsecs"], r"unknown unit 'parsecs' \(known: x, s, ms"),
        (["--latency", "0.5x"], r"slower than the dense engine"),
        (["--latency", "2x,2x"], r"given twice"),
        (["--percentile", "p95"], r"percentile: .*'p50', 'p90' or 'p99'"),
        (["--precision", "fp64"], r"precision: .*'fp32'"),
        (["--precision", "fp16"], r"use --precision fp32"),
        (["--threads", "4096"], r"--threads 4096: this machine lets a process use 1 to"),
        (["--batch", "0"], r"batch: .*greater than or equal to 1"),
        (["--epochs", "nan"], r"epochs: .*finite"),
        (["--seed", "seven"], r"'--seed': .*see passdeploy run --help"),
        (["--profile", "none.json"], r"no such file; passdeploy profile --save"),
        (["--config", "none.yaml"], r"cannot be read .*check the path"),
        (["--laten", "2x"], r"No such option: --laten.*--latency.*see passdeploy run --help"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_flags(passdeploy: Call, tmp_path: Path, arguments: list[str], wanted: str) -> None:
    assert re.search(wanted, refused(passdeploy, tmp_path, *arguments))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("modle: x", r"unknown key 'modle'; did you mean model"),
        ("search: {epoch: 3}", r"unknown key 'search\.epoch'; did you mean epochs"),
        ("- a", r"must be a mapping"),
        ("a: [", r"is not valid YAML"),
        ("batch: two", r"batch: .*given: 'two'"),
        ("latency: 5", r"latency '5': has no unit; give a time with its unit"),
        ("latency: [2x, 5]", r"latency '5': has no unit"),
        ("input_size: [20]", r"input_size"),
        ("input_size: 224", r"input_size: must be a list: \[224, 224\]"),
        ("mean: 0.5", r"mean: must be a list: \[0.5, 0.5, 0.5\]"),
        ("groups: {exclude: stem}", r"groups.exclude: must be a list: \[stem\]"),
        ("std: [0, 1, 1]", r"std"),
        ("prompt: none", r"prompt: must be a mapping of keys \(kind, width, lr, ...\) to values \(given: 'none'\)"),
        ("profile: a100.json", r"the file that --profile reads is profile_file"),
        ("groups: {min_width: 8}", r"groups.min_width: must be a mapping of keys to values"),
        ("groups: {exclude: [a]}\nbatch: 2\ngroups: {}", r"line 3 gives 'groups' again, after line 1"),
        ("search: {lr: 1, lr: 2}", r"line 1 gives 'lr' again"),
    ],
)
def test_bad_configuration(passdeploy: Call, tmp_path: Path, text: str, wanted: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    line = refused(passdeploy, tmp_path, "--config", file)
    assert re.search(wanted, line)
    assert "bad.yaml" in line


def test_a_flag_is_not_blamed_on_the_file(passdeploy: Call, tmp_path: Path) -> None:
    file = tmp_path / "fine.yaml"
    file.write_text("batch: 2")
    line = refused(passdeploy, tmp_path, "--config", file, "--batch", 0)
    assert "--batch: input should be greater than or equal to 1 (given: 0)" in line
    assert "fine.yaml" not in line


def test_multiply_accumulates_are_for_comparisons(passdeploy: Call, tmp_path: Path) -> None:
    file = tmp_path / "macs.yaml"
    file.write_text("axis: macs")
    assert "passdeploy compare --axis macs" in refused(passdeploy, tmp_path, "--config", file)


def weights(path: Path, **changes: torch.Tensor) -> Path:
    state = {name: tensor.clone() for name, tensor in scripted.tiny_resnet().state_dict().items()} | changes
    save_file(state, path)
    return path


def test_bad_weights(passdeploy: Call, tmp_path: Path) -> None:
    good = weights(tmp_path / "good.safetensors")
    torch.save(scripted.tiny_resnet(), tmp_path / "whole.pth")
    (tmp_path / "short.safetensors").write_bytes(good.read_bytes()[:5000])
    weights(tmp_path / "nan.safetensors", **{"fc.bias": torch.tensor([0.0, torch.nan, 0.0])})
    weights(tmp_path / "classes.safetensors", **{"fc.weight": torch.zeros(7, 24), "fc.bias": torch.zeros(7)})
    save_file({"conv.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    for name, wanted in (
        ("none.safetensors", r"no such weights file; in that folder: .*good\.safetensors"),
        ("whole.pth", r"pickled whole module .*torch\.save\(model\.state_dict\(\)"),
        ("short.safetensors", r"truncated or damaged .*copy or download it again"),
        ("nan.safetensors", r"NaN or Inf .*fc\.bias"),
        ("classes.safetensors", r"7 classes apart, the data has 3"),
        ("other.safetensors", r"another architecture.*give the --model"),
    ):
        line = refused(passdeploy, tmp_path, "--weights", tmp_path / name)
        assert re.search(wanted, line), line
        assert name in line


def pictures(folder: Path, classes: str, size: tuple[int, int] = (16, 12), mode: str = "RGB", count: int = 8) -> Path:
    folder.mkdir(exist_ok=True)
    for kind in classes:
        (folder / kind).mkdir(exist_ok=True)
        for index in range(count):
            values = np.random.default_rng(index).integers(0, 255, (*size, len(mode))).astype(np.uint8).squeeze()
            Image.fromarray(values).save(folder / kind / f"{size[0]}-{mode}-{index}.png")
    return folder


def test_bad_image_folders(passdeploy: Call, tmp_path: Path) -> None:
    empty, one = pictures(tmp_path / "empty", ""), pictures(tmp_path / "one", "a")
    spoilt = pictures(tmp_path / "spoilt", "abc")
    next((spoilt / "a").iterdir()).write_bytes(b"no image")
    for folder, wanted in (
        (empty, r"empty; expected a subfolder of images per class"),
        (one, r"one class only \(a\); two classes or more"),
        (spoilt, r"1 of 24 images can't be read \(a/.*replace or remove"),
    ):
        line = refused(passdeploy, tmp_path, "--data", folder)
        assert re.search(wanted, line), line
        assert str(folder) in line


def test_other_sizes_and_grey_images_are_taken(passdeploy: Call, tmp_path: Path) -> None:
    mixed = pictures(pictures(tmp_path / "mixed", "abc"), "abc", size=(24, 30), mode="L")
    Path("passdeploy.yaml").write_text("input_size: [16, 12]")
    said = passdeploy("groups", "--model", "tiny-resnet", "--data", mixed, "--json")
    assert said.code == 0, said.err
    assert json.loads(said.out)["groups"]


def test_a_network_that_does_not_fit_the_data(
    passdeploy: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Path.cwd()
    (work / "nets.py").write_text(
        "from torch import nn\n"
        "def net(cin, n): return nn.Sequential(\n"
        "    nn.Conv2d(cin, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, n))\n"
        "def seven(): return net(3, 7)\n"
        "def grey(): return net(1, 3)\n"
        "def maps(): return nn.Conv2d(3, 3, 3)\n"
        "def number(): return 3\n"
        "def fails(): return 1 / 0\n"
        "def ends(): raise SystemExit(0)\n"
    )
    (work / "script.py").write_text("import sys\nsys.exit(0)\n")
    (work / "mydata.py").write_text("def load(): return open('photos.npy')\n")
    monkeypatch.syspath_prepend(str(work))
    for name, wanted in (
        ("seven", r"has 7 outputs, stripes has 3 classes; let the factory take num_classes"),
        ("grey", r"fails on images of \(3, 16, 12\).*its first convolution takes 1 channel; images are RGB"),
        ("maps", r"must return logits"),
        ("number", r"returned int|int"),
        ("fails", r"division by zero"),
        ("ends", r"building it failed: SystemExit: 0"),
    ):
        line = refused(passdeploy, tmp_path, "--model", f"nets:{name}")
        assert re.search(wanted, line), line
    line = refused(passdeploy, tmp_path, "--model", "script:build")
    assert "importing script failed: SystemExit: 0; put what a script does under if __name__ == '__main__'" in line
    line = refused(passdeploy, tmp_path, "--data", "mydata:load")
    assert "--data mydata:load: loading it failed: FileNotFoundError: " in line
    (work / "nets.py").write_text("print('hello')\nfrom tests.scripted import tiny_resnet\n")
    sys.modules.pop("nets")
    said = passdeploy("groups", "--model", "nets:tiny_resnet", "--data", "stripes", "--json")
    assert json.loads(said.out)["groups"], "nothing but the result"
    assert said.err == "hello\n"


def test_run_directories_that_cannot_be_used(passdeploy: Call, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years")
    good = ("run", "--model", "tiny-resnet", "--data", "stripes", "--backend", "scripted")
    for out, more, wanted in (
        (tmp_path / "file", [], r"cannot be written .*choose another folder"),
        (tmp_path / "file" / "x", [], r"cannot be written"),
        (Path("/proc/none"), [], r"cannot be written"),
        (foreign, [], r"not a run directory"),
        (foreign, ["--fresh"], r"not a run directory"),
    ):
        said = passdeploy(*good, "--out", out, *more)
        assert said.code == 2
        assert re.search(wanted, said.line())
    assert (foreign / "thesis.tex").read_text() == "years"


def test_a_wrong_flag_deletes_nothing(passdeploy: Call, single: Path) -> None:
    """--fresh beside a mistake: the mistake is found before anything is deleted."""
    before = sorted(single.rglob("*"))
    good = ("run", "--model", "tiny-resnet", "--data", "stripes", "--backend", "scripted", "--out", single, "--fresh")
    for wrong in (["--model", "tiny-resnt"], ["--weights", "none"], ["--latency", "5"], ["--data", "none"]):
        assert passdeploy(*good, *wrong).code == 2
    assert sorted(single.rglob("*")) == before


def test_another_configuration_names_the_keys(passdeploy: Call, single: Path) -> None:
    good = ("run", "--model", "tiny-resnet", "--data", "stripes", "--backend", "scripted", "--out", single)
    said = passdeploy(*good, "--latency", "3x")
    assert said.code == 2
    line = said.line()
    assert "latency" in line
    assert "profile.structures" in line
    assert "--fresh" in line


def test_half_of_model_and_data(passdeploy: Call) -> None:
    assert "--data is missing" in passdeploy("run", "--model", "resnet20").line()
    assert "--model is missing" in passdeploy("run", "--data", "stripes").line()


@pytest.mark.parametrize("verb", ["search", "fit", "finetune", "compile", "report", "ship"])
def test_a_stage_needs_a_run_directory(passdeploy: Call, tmp_path: Path, verb: str) -> None:
    said = passdeploy(verb, "--out", tmp_path / "none")
    assert said.code == 2
    assert "passdeploy run" in said.line()


def test_folders_around_what_was_meant_name_it(passdeploy: Call, finished: Path, single: Path) -> None:
    assert "2x" in passdeploy("bench", finished).line()
    said = passdeploy("verify", single)
    assert f"did you mean {single / 'bundle'}?" in " ".join((said.out + said.err).split())


@pytest.mark.parametrize("arguments", [["verify"], ["search"], ["nonsense"], ["bench"], ["verify", "none"]])
def test_other_wrong_calls(passdeploy: Call, arguments: list[str]) -> None:
    said = passdeploy(*arguments)
    assert said.code == 2
    assert said.line()


def test_errors_as_json(passdeploy: Call) -> None:
    said = passdeploy("run", "--model", "resnet19", "--data", "stripes", "--json")
    assert said.code == 2
    assert json.loads(said.out)["kind"] == "BadInput"
    assert "resnet19" in json.loads(said.out)["error"]
    assert len(said.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["bench", "a", "b"], "interrupted"),
        (["doctor"], "interrupted"),
        (["compare", "--latency", "2x"], "interrupted: the same command continues where it stopped"),
        (["run", "--fresh"], "interrupted: the same command without --fresh continues where it stopped"),
    ],
)
def test_ctrl_c_promises_to_go_on_where_that_is_so(
    passdeploy: Call, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    def interrupted(**_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", interrupted)
    got = passdeploy(*arguments)
    assert (got.code, got.err.strip()) == (130, said)


def test_a_disk_that_fills(tmp_path: Path) -> None:
    """Files may not grow beyond a few kilobytes: one line, exit 2, and with room again the run goes on."""
    run = tmp_path / "run"
    script = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from tests import scripted\n"
        "from passdeploy import api, cli\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))\n"
        "sys.argv = ['passdeploy', 'search', '--out', sys.argv[1]]\n"
        "api.run_stage = lambda *_, **__: scripted.start(Path(sys.argv[3])).run_until('dense')\n"
        "cli.main()\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def start(limit: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", script, str(run), str(limit), str(run)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)

    full = start(20_000)
    assert full.returncode == 2, full.stderr
    (line,) = full.stderr.splitlines()
    assert line.startswith("error: ")
    assert "free " in line
    assert not (run / "dense").exists()
    roomy = start(1 << 30)
    assert roomy.returncode == 0, roomy.stderr
    assert (run / "dense" / "dense.safetensors").exists()


# --- what is printed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["ship", "run", "--key", "public.pem"], "--key goes with --server"),
        (["ship", "run", "--instances", "2"], "--instances goes with --server"),
        (["ship", "run", "--out", "models"], "give one run directory"),
        (["ship", "run", "--server", "triton", "--model", "resnet20"], "--model goes with a run whose bundle"),
        (["ship", "run", "--server", "mlserver", "--kind", "python"], "--kind goes with --server triton or kserve"),
        (["ship", "run", "--server", "mlserver", "--instances", "2"], "--instances goes with --server triton"),
        (["ship", "run", "--server", "triton", "--storage-uri", "pvc://x"], "--storage-uri goes with --server kserve"),
        (["report", "run", "--model", "resnet20"], "--model goes with --out"),
        (["report", "run", "--out", "run"], "give one of the two"),
        (["report", "--out", "run", "--format", "html"], "--format goes with run directories"),
        (["bench", "engine", "--fail-if-slower", "5%"], "give two or more"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_would_be_ignored_is_refused(passdeploy: Call, arguments: list[str], wanted: str) -> None:
    said = passdeploy(*arguments)
    assert said.code == 2
    assert wanted in said.line()


def test_a_report_has_one_format(passdeploy: Call) -> None:
    said = passdeploy("report", "run", "--json", "--format", "html")
    assert said.code == 2
    assert "leave it out for --format html" in json.loads(said.out)["error"]


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_an_example(passdeploy: Call, verb: str) -> None:
    said = passdeploy(verb, "--help")
    assert said.code == 0
    assert re.search(rf"Example: *`?passdeploy {verb}", re.sub(r"[│\s]+", " ", said.out)), said.out
    assert "--json" in said.out


def test_the_version(passdeploy: Call) -> None:
    said = passdeploy("--version")
    assert (said.code, said.out.strip()) == (0, version())


def test_every_verb_is_tested(passdeploy: Call) -> None:
    commands = {c.name or getattr(c.callback, "__name__", "") for c in cli.app.registered_commands}
    assert commands <= {*VERBS, "study"}


def test_run_prints_only_json(passdeploy: Call, single: Path) -> None:
    """A finished run, asked for once more."""
    import yaml

    values = yaml.safe_load((single / "config.yaml").read_text())
    config = Path("again.yaml")
    config.write_text(yaml.safe_dump(values))
    said = passdeploy("run", "--config", config, "--out", single, "--json")
    assert said.code == 0, said.err
    assert said.err == ""
    assert json.loads(said.out) == json.loads((single / "report.json").read_text())
    plain = passdeploy("run", "--config", config, "--out", single)
    assert plain.code == 0
    assert "within_budget" in plain.out
    assert "report.html" in plain.out.replace("\n", "")
    staged = passdeploy("fit", "--out", single, "--json")
    assert staged.code == 0
    assert json.loads(staged.out) == {"stage": "fit", "folders": [str(single / "fit")]}


def test_several_budgets_print_a_list(passdeploy: Call, finished: Path) -> None:
    said = passdeploy("run", "--config", finished / "config.yaml", "--out", finished, "--json")
    assert said.code == 1
    assert [report["budget"]["asked"] for report in json.loads(said.out)] == ["2x", "50x", "5s"]


def test_report_in_every_format_with_others_measurements(passdeploy: Call, single: Path, finished: Path) -> None:
    times = Path("trtexec.json")
    times.write_text(json.dumps([{"computeMs": 1.25, "latencyMs": 1.5} for _ in range(70)]))
    beside = passdeploy("report", single, "--trtexec", times)
    assert beside.code == 0, beside.err
    assert "trtexec.json" in beside.out and "1.25 ms" in beside.out
    commit = json.loads(passdeploy("report", single, "--json").out)["provenance"]["commit"]
    trend = passdeploy("report", single, finished, "--format", "history")
    assert trend.code == 0, trend.err
    assert trend.out.startswith("<!doctype html>")
    assert commit is None or commit[:7] in trend.out
    refused = passdeploy("report", finished, "--trtexec", times)
    assert refused.code == 2, "a folder with three budgets is three reports"
    assert "give one run" in refused.err


def test_a_profile_of_other_settings_wants_fresh(
    passdeploy: Call, copied: Callable[[], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Path("passdeploy.yaml").write_text("profile: {structures: 9, seconds: 1e6, cache: off}\n")
    call = ("profile", "--model", "tiny-resnet", "--data", "stripes", "--backend", "scripted", "--save", "p.json")
    out = copied()
    call += ("--out", str(out), "--json")
    refused = passdeploy(*call)
    assert refused.code == 2
    assert "--fresh" in json.loads(refused.out)["error"]
    again = passdeploy(*call, "--fresh")
    assert again.code == 0, again.err
    assert json.loads(again.out)["n"] == 10, "nine and the dense one"
    dense = json.loads((out / "dense" / "dense.json").read_text())
    assert (dense["weights"], dense["accuracy"], dense["curve"]) == ("untrained", None, None)
    assert not (tmp_path / "cache" / "passdeploy").exists()


def test_targets(passdeploy: Call) -> None:
    rows = {row["name"]: row for row in json.loads(passdeploy("targets", "--json").out)}
    assert rows["cpu"]["attached"]
    assert rows["cpu"]["backend"] == "onnxruntime"
    assert rows["a100"]["compute_capability"] == "8.0"
    table = passdeploy("targets")
    assert table.code == 0
    assert all(name in table.out for name in rows)


def test_groups(passdeploy: Call) -> None:
    said = json.loads(passdeploy("groups", "--model", "tiny-resnet", "--data", "stripes", "--json").out)
    kinds = [group["kind"] for group in said["groups"]]
    assert kinds.count("depth") == 3
    first = said["groups"][0]
    assert first["units"] == 16
    assert {"conv1", "layer1.0.conv2", "layer1.1.conv2"} <= {member["module"] for member in first["members"]}
    table = passdeploy("groups", "--model", "tiny-resnet", "--data", "stripes")
    assert table.code == 0
    assert all(group["name"] in table.out for group in said["groups"])


def test_groups_of_a_model_alone(passdeploy: Call) -> None:
    said = passdeploy("groups", "--model", "resnet20", "--json")
    assert said.code == 0, said.err
    assert len(json.loads(said.out)["groups"]) > 10


def test_doctor(passdeploy: Call) -> None:
    said = passdeploy("doctor", "--json")
    assert said.code == 0, said.err
    assert json.loads(said.out)["ok"]


def test_groups_under_control_of_the_user(passdeploy: Call) -> None:
    flags = ("--exclude", "layer3", "--min-width", "layer1.*.conv1=8", "--fixed-width", "conv1=12")
    flags += ("--tie", "layer2.0.conv1,layer2.1.conv1")
    said = json.loads(passdeploy("groups", "--model", "resnet20", *flags, "--json").out)
    found = {group["name"]: group for group in said["groups"]}
    assert not any(name.startswith("layer3") for name in found)
    assert (found["layer1.0.conv1"]["least"], found["conv1"]["fixed"]) == (8, 12)
    assert "layer2.1.conv1" in {member["module"] for member in found["layer2.0.conv1"]["members"]}
    assert "fixed at 12" in passdeploy("groups", "--model", "resnet20", *flags).out


@pytest.mark.parametrize("given", ["layer1", "layer1=many", "layer1=²"])
def test_a_width_that_is_none_is_refused(passdeploy: Call, given: str) -> None:
    said = passdeploy("groups", "--model", "resnet20", "--min-width", given)
    assert said.code == 2
    assert f"--min-width {given}: expected NAME=CHANNELS" in said.err


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you"),
    ],
)
def test_out_of_memory_is_said_in_a_line(passdeploy: Call, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def app(**_: object) -> int:
        raise error

    monkeypatch.setattr(cli, "app", app)
    said = passdeploy("targets")
    assert said.code == 2, "1 says that a goal was not met"
    assert "out of memory: lower train_batch or --batch" in said.line()


def test_a_mistake_of_ours_is_a_line_and_no_missed_goal(passdeploy: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def app(**_: object) -> int:
        raise RuntimeError("shapes do not\nfit")

    monkeypatch.setattr(cli, "app", app)
    said = passdeploy("targets")
    assert said.code == 70, "1 says that a goal was not met"
    assert said.line() == "error: internal error: RuntimeError: shapes do not fit; --debug shows where"
    assert json.loads(passdeploy("targets", "--json").out)["kind"] == "InternalError"
    shown = passdeploy("targets", "--debug", "--json")
    assert shown.code == 70
    assert "Traceback" in shown.err and 'raise RuntimeError("shapes do not' in shown.err
    assert json.loads(shown.out)["kind"] == "InternalError"


def test_the_traceback_of_bad_input_changes_no_status(passdeploy: Call) -> None:
    said = passdeploy("run", "--model", "tiny-resnt", "--data", "stripes", "--debug")
    assert said.code == 2
    assert "Traceback" in said.err
    assert said.err.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (
            PermissionError(errno.EACCES, "Permission denied", "run/SHA256SUMS"),
            "run/SHA256SUMS: Permission denied; check",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), "writing: No space left on device; free some space"),
    ],
)
def test_what_the_system_refuses_is_no_mistake_of_ours(
    passdeploy: Call, monkeypatch: pytest.MonkeyPatch, error: OSError, wanted: str
) -> None:
    def app(**_: object) -> int:
        raise error

    monkeypatch.setattr(cli, "app", app)
    said = passdeploy("bench", "run", "run")
    assert said.code == 2
    assert wanted in said.line()


@pytest.mark.parametrize("arguments", [["report", str(EXAMPLE)], ["report", str(EXAMPLE), "--json"]])
def test_a_result_for_which_there_is_no_room(arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        said = subprocess.run(
            [sys.executable, "-m", "passdeploy", *arguments], stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT
        )
    assert said.returncode == 2
    assert said.stderr.splitlines() == ["error: writing: No space left on device; free some space"]


def test_a_summary_is_of_what_was_exported(passdeploy: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    assert passdeploy("report", EXAMPLE, "--format", "htlm").code == 2
    assert not (tmp_path / "summary.md").exists()
    assert passdeploy("report", EXAMPLE, "--format", "html").code == 0
    assert (tmp_path / "summary.md").exists()


def test_a_configuration_that_is_not_text(passdeploy: Call) -> None:
    Path("other.yaml").write_bytes("model: größe".encode("latin-1"))
    said = passdeploy("run", "--config", "other.yaml")
    assert said.code == 2
    assert "--config other.yaml: is not text in UTF-8" in said.line()


def test_a_profile_is_of_latencies(passdeploy: Call) -> None:
    Path("passdeploy.yaml").write_text("model: tiny-resnet\ndata: stripes\naxis: macs\n")
    said = passdeploy("profile", "--save", "p.json", "--backend", "scripted")
    assert said.code == 2
    assert "axis macs: passdeploy profile measures latencies" in said.err
