"""How structures are measured: by backends that start from torch.export too, and end to end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from passdeploy import meter as module
from passdeploy.data.base import Preprocess
from passdeploy.engines._common import told
from passdeploy.engines._end_to_end import EndToEnd
from passdeploy.engines.base import Arrays, Engine, Runner, get_backend
from passdeploy.errors import BadInput, DenseFailed
from passdeploy.export import INPUT, OUTPUT, OnnxSlicer, onnx_function
from passdeploy.groups import find_groups
from passdeploy.latency.log import attempt
from passdeploy.latency.measure import QUICK, interleave
from passdeploy.latency.measurement import Comparison
from passdeploy.latency.profile import keep_first
from passdeploy.latency.sampler import Sampler
from passdeploy.meter import Meter
from passdeploy.search.prompt import InputStage, Prompted
from passdeploy.structure import Structure
from passdeploy.targets import resolve
from tests.scripted import tiny_resnet

SHAPE = (3, 16, 12)


def meter(backend: str) -> Meter:
    torch.manual_seed(0)
    network = tiny_resnet().eval()
    groups = find_groups(network, torch.randn(1, *SHAPE))
    model = Prompted(InputStage(Preprocess(size=SHAPE[1:])), network)
    images = np.random.default_rng(0).random((2, *SHAPE), dtype=np.float32)
    return Meter(OnnxSlicer(model, groups, SHAPE), groups, resolve("cpu", backend=backend), images)


def test_structures_are_measured_on_inductor_too() -> None:
    """A real AOTInductor package: what would be timed computes what the ONNX file of the structure does."""
    inductor = get_backend("inductor")
    if reason := inductor.available(resolve("cpu")):
        pytest.skip(f"inductor: {reason}")
    with meter("inductor") as timed:
        widths = [0 if g.kind == "depth" and i % 2 else max(1, g.units // 2) for i, g in enumerate(timed.groups.groups)]
        structure = keep_first(timed.groups, np.array(widths))
        engine = timed.engine(structure)
        with inductor.runner(engine, timed.target) as runner:
            got = runner.run({INPUT: timed.images})[OUTPUT]
        expected = np.concatenate(
            [onnx_function(timed.slicer.slice(structure))(timed.images[i : i + 1]) for i in range(2)]
        )
        assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()


def test_engines_that_take_long_to_build_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    with meter("onnxruntime") as timed:
        dense, other = timed.groups.dense(), keep_first(timed.groups, np.ones(len(timed.groups.groups)))
        assert timed.engine(dense) is not timed.engine(dense), "quick to build: built again"
        monkeypatch.setattr(module, "SLOW_S", 0.0)
        first = timed.engine(dense)
        assert timed.engine(dense) is first
        assert timed.engine(other) is not first
        monkeypatch.setattr(module, "KEPT_BYTES", 0)
        third = keep_first(timed.groups, np.array([g.units for g in timed.groups.groups]) - 1)
        assert timed.engine(third) is not timed.engine(third), "there is an end to it"


def test_a_structure_that_takes_the_process_along_leaves_the_next_ones_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that dies takes the dense engine that is loaded in it along: the next structure gets a new one."""
    opened: list[str] = []
    timed_as_it_is = Meter._timed

    def opening(self: Meter, structure: Structure) -> Runner:
        opened.append(structure.digest())
        return timed_as_it_is(self, structure)

    def killed(self: Sampler, thin: Runner) -> dict[str, float]:
        raise BadInput("its process was killed")

    monkeypatch.setattr(Meter, "_timed", opening)
    with meter("onnxruntime") as timed:
        dense, other = timed.groups.dense().digest(), keep_first(timed.groups, np.ones(len(timed.groups.groups)))
        timed.sample(other)
        with monkeypatch.context() as patch, pytest.raises(BadInput, match="killed"):
            patch.setattr(Sampler, "__call__", killed)
            timed.sample(other)
        assert opened.count(dense) == 1
        timed.sample(other)
        timed.sample(other)
        assert opened.count(dense) == 2


def test_a_dense_engine_that_dies_in_its_warm_up_is_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        raise BadInput("its process was killed")

    with meter("onnxruntime") as timed:
        other = keep_first(timed.groups, np.ones(len(timed.groups.groups)))
        with monkeypatch.context() as patch:
            patch.setattr("passdeploy.latency.sampler.warm_up", killed)
            for _ in range(2):
                with pytest.raises(DenseFailed, match="dense engine: its process was killed"):
                    attempt(lambda: timed.sample(other))
        assert "failed" not in attempt(lambda: timed.sample(other))


@pytest.mark.parametrize("how", ["sample", "compare"])
def test_a_dense_engine_that_fails_is_told_from_a_structure_that_does(
    monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    with meter("onnxruntime") as timed:
        dense, other = timed.groups.dense().digest(), keep_first(timed.groups, np.ones(len(timed.groups.groups)))
        compiled, broken = Meter._compiled, [dense]

        def refusing(self: Meter, structure: Structure) -> Engine:
            if structure.digest() in broken:
                raise BadInput("out of memory")
            return compiled(self, structure)

        monkeypatch.setattr(Meter, "_compiled", refusing)
        take = timed.sample if how == "sample" else lambda structure: timed.compare(structure, QUICK)
        for _ in range(2):  # nothing is left of the first try that the second would take for a dense engine
            with pytest.raises(DenseFailed, match="dense engine: out of memory"):
                attempt(lambda: take(other))  # type: ignore[arg-type,return-value]
        broken[:] = [other.digest()]
        assert attempt(lambda: take(other)) == {"failed": "out of memory"}  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize("broken", ["dense", "thin"])
def test_which_engine_fails_in_a_process_of_its_own_is_found_out(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    """A process in which both are timed says only that something failed."""
    asked: list[bool] = []

    def failing(folders: Mapping[str, Path], *rest: Any) -> Comparison:
        with_thin = folders["dense"] != folders["thin"]
        asked.append(with_thin)
        if broken == "dense" or with_thin:
            raise BadInput("its process was killed")
        return timed_as_it_is(folders, *rest)

    timed_as_it_is = module.compare_files
    monkeypatch.setattr(module, "compare_files", failing)
    with meter("onnxruntime") as timed:
        other = keep_first(timed.groups, np.ones(len(timed.groups.groups)))
        for _ in range(2):
            if broken == "thin":
                assert attempt(lambda: vars(timed.compare(other, QUICK))) == {"failed": "its process was killed"}
                continue
            with pytest.raises(DenseFailed, match="dense engine: its process was killed"):
                attempt(lambda: vars(timed.compare(other, QUICK)))
    assert asked == ([True, False, True] if broken == "thin" else [True, False] * 2), "a dense engine that ran is known"


class _Own(Runner):
    """Times itself, as an engine in a child process does."""

    def __init__(self) -> None:
        self.bound: Arrays | None = None
        self.asked: list[tuple[float, int]] = []
        self.runs = 0

    def bind(self, inputs: Arrays) -> None:
        self.bound = inputs

    def run(self, inputs: Arrays) -> Arrays:
        self.runs += 1
        return {}

    def end_to_end_block(self, seconds: float, calls: int) -> list[float]:
        assert self.bound is not None
        self.asked.append((seconds, calls))
        return [0.002] * calls

    def block(self, seconds: float, calls: int) -> list[float]:
        raise AssertionError("the engine's scope")


def test_a_runner_that_times_its_transfers_itself_does() -> None:
    runner, inputs = _Own(), {INPUT: np.zeros((1, *SHAPE), np.float32)}
    measured = interleave({"own": EndToEnd(runner, inputs)}, QUICK).measurements["own"]
    assert measured.p50 == pytest.approx(2.0)
    assert runner.bound is inputs
    assert runner.asked and runner.runs == 0


def test_a_runner_that_does_not_is_timed_from_outside() -> None:
    class Plain(_Own):
        end_to_end_block = None  # type: ignore[assignment]

    runner = Plain()
    assert interleave({"plain": EndToEnd(runner, {})}, QUICK).measurements["plain"].n > 0
    assert runner.runs > 0


def test_thin_networks_are_measured_behind_the_prompt_that_they_ship_with() -> None:
    """The dense reference is not: nobody would ship it with one."""
    plain = meter("onnxruntime")
    behind = Prompted(InputStage(Preprocess(size=SHAPE[1:]), "expansive", 2), plain.slicer.model.network)
    prompted = OnnxSlicer(behind, plain.groups, SHAPE)
    timed = Meter(plain.slicer, plain.groups, plain.target, plain.images, thin_slicer=prompted)
    small = keep_first(plain.groups, np.ones(len(plain.groups.groups)))

    def resizes(engine: Engine) -> bool:
        return b"Resize" in engine.data

    assert resizes(timed.engine(small)) and not resizes(plain.engine(small))
    assert not resizes(timed.engine(plain.groups.dense()))


@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        (RuntimeError("out of memory\nmore"), BadInput),
        (DenseFailed("dense"), DenseFailed),
        (KeyError("ours"), KeyError),
    ],
)
def test_what_a_runtime_raises_is_one_line_and_what_is_a_mistake_of_ours_is_not(
    raised: Exception, kind: type[Exception]
) -> None:
    with pytest.raises(kind) as caught, told("the engine"):
        raise raised
    assert "\n" not in str(caught.value)
    assert (str(caught.value) == "the engine cannot be run: out of memory more") == (kind is BadInput)
