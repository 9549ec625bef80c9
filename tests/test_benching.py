"""`passdeploy bench`: what can be timed, and how a comparison is judged."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from passdeploy import bench_outcome, benching
from passdeploy.console import Ui
from passdeploy.data.base import Preprocess
from passdeploy.engines.base import CompileInput, get_backend
from passdeploy.engines.onnxruntime import OrtRunner
from passdeploy.errors import BadInput
from passdeploy.export import export_onnx
from passdeploy.latency.measure import BENCH, Settings, interleave
from passdeploy.latency.measurement import Comparison
from passdeploy.layers import OTHER
from passdeploy.search.prompt import InputStage, Prompted
from passdeploy.targets import resolve
from tests.latency.scripted import FakeClock, ScriptedRunner

SHORT = Settings(pairs=6, block_s=0.002, warmup_s=0.002, percentiles=())


def scripted(**seconds: float) -> Comparison:
    clock = FakeClock()
    return interleave({name: ScriptedRunner(clock, value) for name, value in seconds.items()}, clock=clock)


@pytest.mark.parametrize(("seconds", "told"), [(1e-3, False), (0.3, True)])
def test_who_waits_long_is_told(seconds: float, told: bool, capsys: pytest.CaptureFixture[str]) -> None:
    clock = FakeClock()
    runners = {name: ScriptedRunner(clock, seconds) for name in "ab"}
    interleave(runners, clock=clock, progress=benching.announced(Ui(), BENCH.pairs, clock))
    # 38 more rounds of two blocks of four calls of 0.3 s each would take 91 s
    assert ("Timing for about 60 s: up to 40 rounds" in capsys.readouterr().err) == told


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("network")
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    model = Prompted(InputStage(Preprocess((16, 12))), layers).eval()
    return export_onnx(model, folder / "model.onnx", (3, 16, 12))


@pytest.mark.parametrize(("seconds", "code"), [(1.0e-3, 0), (1.03e-3, 0), (1.08e-3, 1), (0.5e-3, 0)])
def test_outcome(seconds: float, code: int) -> None:
    assert bench_outcome.outcome(scripted(reference=1e-3, other=seconds), 0.05) == code


def test_any_slower_one_decides() -> None:
    assert bench_outcome.outcome(scripted(reference=1e-3, same=1e-3, slow=1.2e-3), 0.05) == 1


@pytest.mark.parametrize("text", ["5", "-1%", "five%", "nan%", ""])
def test_margin_needs_a_percentage(text: str) -> None:
    with pytest.raises(BadInput, match="percentage"):
        bench_outcome.parse_margin(text)


def test_a_margin_that_no_measurement_resolves_is_refused() -> None:
    """It would be judged by another one than was typed."""
    for text in ("0%", "1.9%"):
        with pytest.raises(BadInput, match="differ by up to 2%; give that or more"):
            bench_outcome.parse_margin(text)
    assert bench_outcome.parse_margin("2%") == pytest.approx(0.02)


def test_margin() -> None:
    assert bench_outcome.parse_margin(" 5% ") == pytest.approx(0.05)


@pytest.mark.parametrize(("thin", "code"), [(0.5e-3, 0), (0.45e-3, 0), (0.7e-3, 1)])
def test_against_a_stored_report(thin: float, code: int, tmp_path: Path) -> None:
    example = json.loads((Path(__file__).parent / "reporting" / "example.json").read_text())
    example["speedup"] |= {"latency": 2.0, "latency_ci95": [1.98, 2.02]}
    (tmp_path / "report.json").write_text(json.dumps(example))
    judged, said = bench_outcome.against_report(scripted(dense=1e-3, thin=thin), tmp_path / "report.json", 0.05)
    assert judged == code
    assert "2.000x in the report" in said


@pytest.mark.parametrize(
    ("then", "now", "said"),
    [
        ("yes", True, ""),
        ("no", False, ""),
        (None, True, ""),
        ("yes", False, "; weights lay in huge pages then, and do not now: .*export GLIBC_TUNABLES="),
        ("no", True, "; weights lie in huge pages now, and did not then"),
    ],
)
def test_a_report_of_other_pages_says_so(
    then: str | None, now: bool, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = json.loads((Path(__file__).parent / "reporting" / "example.json").read_text())
    example["speedup"] |= {"latency": 2.0, "latency_ci95": [1.98, 2.02]}
    example["target"]["compute_capability"] = None
    example["environment"]["settings"] = {} if then is None else {"huge pages": then}
    (tmp_path / "report.json").write_text(json.dumps(example))
    monkeypatch.setattr(bench_outcome.huge_pages, "used", lambda: now)
    _, told = bench_outcome.against_report(scripted(dense=1e-3, thin=0.5e-3), tmp_path / "report.json", 0.05)
    assert re.fullmatch(f"not slower than the report: [^;]*{said}.*" if said else "[^;]*", told)


def compare(*given: str, **options: Any) -> Comparison:
    with benching.opened(list(given), **options) as runners:
        return interleave(runners, SHORT)


def test_onnx_and_engine_are_timed_side_by_side(network: Path, tmp_path: Path) -> None:
    target = resolve("cpu", backend="onnxruntime")
    backend = get_backend("onnxruntime")
    backend.save(backend.compile(CompileInput(onnx=network), target), tmp_path / "engine")
    given = [str(network), str(tmp_path), str(tmp_path / "engine")]
    with benching.opened(given) as runners:
        data = benching.to_json(interleave(runners, SHORT), runners.made)
    assert data["reference"] == str(network)
    assert list(data["engines"]) == [str(network), str(tmp_path), str(tmp_path / "engine")]
    assert all(row["n"] > 0 for row in data["engines"].values())
    made = {"backend": "onnxruntime", "precision": "fp32", "batch": 1, "threads": 1}
    assert all(row | made == row for row in data["engines"].values())


@pytest.mark.parametrize("proof", [True, False, None])
def test_an_engine_that_was_not_proven_is_not_timed(proof: bool | None, network: Path, tmp_path: Path) -> None:
    """It lies in the stage's folder, and the run offers none."""
    backend = get_backend("onnxruntime")
    engine = backend.compile(CompileInput(onnx=network), resolve("cpu", backend="onnxruntime"))
    backend.save(engine, tmp_path / "run" / "compile" / "engine")
    (tmp_path / "run" / "compile" / "stage.json").write_text("{}")
    if proof is not None:
        (tmp_path / "run" / "compile" / "proof.json").write_text(json.dumps({"ok": proof}))
    if proof:
        assert benching.open_source(str(tmp_path / "run"), "cpu", None, 1).engine is not None
        return
    with pytest.raises(BadInput, match="no engine, ONNX file, run directory or bundle"):
        benching.open_source(str(tmp_path / "run"), "cpu", None, 1)


def test_onnx_files_are_compiled_as_the_engine_beside_them(network: Path, tmp_path: Path) -> None:
    """Else the reference is handicapped, and what is slower passes for faster."""
    backend = get_backend("openvino")
    engine = backend.compile(CompileInput(onnx=network), resolve("cpu", backend="openvino", threads=2))
    file = backend.save(engine, tmp_path / "run" / "engine")
    for given in (tmp_path / "run", file):
        with benching.opened([str(network), str(given)]) as runners:
            assert len(set(runners.made.values())) == 1, runners.made
    with benching.opened([str(network), str(tmp_path / "run")], backend="onnxruntime", threads=1) as runners:
        assert [(made.backend, made.threads) for made in runners.made.values()] == [("onnxruntime", 1), ("openvino", 2)]


def test_the_same_engine_may_be_given_twice(network: Path) -> None:
    comparison = compare(str(network), str(network))
    assert len(comparison.measurements) == 2


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_layers_are_told_apart_by_module(network: Path, backend: str) -> None:
    with benching.opened([str(network), str(network)], backend=backend) as runners:
        rows = benching.layers(runners)
    assert len(rows) > 3
    named = [row for row in rows if row.name != OTHER]
    assert sum(row.ms[0] for row in named) > 0.5 * sum(row.ms[0] for row in rows)
    assert all(len(row.ms) == 2 and max(row.ms) > 0 for row in rows)


def test_what_is_no_engine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no engine, ONNX file"):
        compare(str(tmp_path / "nothing"))
    (tmp_path / "broken.onnx").write_bytes(b"not a graph")
    with pytest.raises(BadInput, match=r"broken\.onnx"):
        compare(str(tmp_path / "broken.onnx"))


def export_elsewhere(path: Path, module: nn.Module, *shape: int, name: str = "x", **options: Any) -> Path:
    torch.onnx.export(
        module.eval(), (torch.zeros(*shape),), path, input_names=[name], dynamo=False, opset_version=17, **options
    )
    return path


@pytest.mark.filterwarnings("ignore")
def test_networks_exported_elsewhere(tmp_path: Path) -> None:
    """Their input has another name; what is no network for images of one size is refused in one line."""
    images = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    good = export_elsewhere(tmp_path / "good.onnx", images, 2, 3, 8, 8, name="pixel_values")
    for backend in ("onnxruntime", "openvino"):
        assert compare(str(good), backend=backend).measurements[str(good)].n > 0
    open_size = export_elsewhere(
        tmp_path / "open.onnx", nn.Conv2d(3, 4, 3), 1, 3, 8, 8, name="x", dynamic_axes={"x": [2, 3]}
    )
    with pytest.raises(BadInput, match=r"takes \(1, 3, any, any\), not images of one size"):
        compare(str(open_size))
    flat = export_elsewhere(tmp_path / "flat.onnx", nn.Linear(3, 4), 1, 3)
    with pytest.raises(BadInput, match=r"takes \(1, 3\), not images"):
        compare(str(flat))

    class Two(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return a + b

    zeros = torch.zeros(1, 3, 4, 4)
    torch.onnx.export(Two(), (zeros, zeros), tmp_path / "two.onnx", input_names=["a", "b"], dynamo=False)
    with pytest.raises(BadInput, match="network of one input"):
        compare(str(tmp_path / "two.onnx"))


def test_whatever_a_runtime_raises_is_one_line(network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []

    def refuse(*_: object) -> None:
        raise RuntimeError("no kernel\nfor this")

    monkeypatch.setattr(OrtRunner, "bind", refuse)
    monkeypatch.setattr(OrtRunner, "close", lambda runner: closed.append(runner))
    with pytest.raises(BadInput, match="cannot be timed: no kernel for this"):
        compare(str(network))
    assert len(closed) == 1
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "SHA256SUMS").write_text("torn")
    with pytest.raises(BadInput, match="bundle: cannot be timed: "):
        compare(str(tmp_path / "bundle"))


def test_whatever_a_runtime_raises_while_it_is_timed_is_one_line(
    network: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("no memory\nfor this")

    monkeypatch.setattr(OrtRunner, "call", refuse)
    with pytest.raises(BadInput, match="bench: one of the engines cannot be run: no memory for this"):
        compare(str(network))


def test_an_engine_for_a_gpu_is_not_timed_on_a_cpu(network: Path, tmp_path: Path) -> None:
    backend = get_backend("onnxruntime")
    engine = backend.compile(CompileInput(onnx=network), resolve("cpu", backend="onnxruntime"))
    elsewhere = replace(engine, meta={**engine.meta, "providers": ["CUDAExecutionProvider"]})
    backend.save(elsewhere, tmp_path / "engine")
    with pytest.raises(BadInput, match="compiled for CUDAExecutionProvider, and cpu runs CPUExecutionProvider"):
        compare(str(tmp_path / "engine"))


@pytest.mark.parametrize(
    ("given", "flags"), [(["one"], {"fail_if_slower": "5%"}), (["a", "b", "c"], {"against": Path("report.json")})]
)
def test_what_cannot_be_judged_is_not_measured(given: list[str], flags: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="give two"):
        bench_outcome.check_judged(given, **{"fail_if_slower": None, "against": None} | flags)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": {"scope": "end_to_end"}}, r"report\.json: its speed-up is of scope end_to_end"),
        ({"speedup": {"latency": None, "latency_ci95": None}}, "no measured speed-up"),
    ],
)
def test_a_report_that_engines_cannot_be_held_against_is_refused_first(
    change: dict[str, dict[str, Any]], message: str, tmp_path: Path
) -> None:
    example = json.loads((Path(__file__).parent / "reporting" / "example.json").read_text())
    for section, values in change.items():
        example[section] |= values
    (tmp_path / "report.json").write_text(json.dumps(example))
    with pytest.raises(BadInput, match=message):
        bench_outcome.check_judged(["a", "b"], None, tmp_path / "report.json")


@pytest.mark.parametrize(
    ("target", "refused"),
    [
        ({"backend": "onnxruntime", "precision": "fp32", "batch": 1, "threads": 1}, None),
        ({"precision": "int8"}, "onnxruntime int8, batch 1, threads 1"),
        ({"backend": "openvino"}, "openvino fp32, batch 1, threads 1"),
        ({"threads": 4}, "onnxruntime fp32, batch 1, threads 4"),
    ],
)
def test_engines_for_something_else_are_not_held_against_a_report(
    target: dict[str, Any], refused: str | None, network: Path, tmp_path: Path
) -> None:
    """An ONNX file is compiled with the defaults, beside an engine that keeps what it was compiled for."""
    backend = get_backend("onnxruntime")
    made = resolve("cpu", backend="onnxruntime")
    backend.save(backend.compile(CompileInput(onnx=network), made), tmp_path / "engine")
    example = json.loads((Path(__file__).parent / "reporting" / "example.json").read_text())
    example["target"] |= target
    stored = tmp_path / "report.json"
    stored.write_text(json.dumps(example))
    given = [str(network), str(tmp_path / "engine")]
    if refused is None:
        with benching.opened(given, against=stored) as runners:
            assert len(runners) == 2
        return
    said = rf"its engines are {refused}, and .*model\.onnx is onnxruntime fp32, batch 1, threads 1; give the engines"
    with pytest.raises(BadInput, match=said), benching.opened(given, against=stored):
        pass


@pytest.mark.filterwarnings("ignore")
def test_calls_of_different_batches_are_not_compared(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    one, two = (export_elsewhere(tmp_path / f"{batch}.onnx", net, batch, 3, 8, 8) for batch in (1, 2))
    with pytest.raises(BadInput, match=rf"one batch size \({one}: 1, {two}: 2\); compile them for the same --batch"):
        compare(str(one), str(two))


def test_what_is_not_attached_is_not_timed(network: Path) -> None:
    with pytest.raises(BadInput, match="nothing can be timed here"):
        compare(str(network), target="a100", backend="tensorrt_rtx")
