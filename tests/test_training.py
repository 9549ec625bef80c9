"""Training: everything random is a function of the step, so that a continued run is the one never stopped."""

from __future__ import annotations

import copy
import dataclasses
import time
import zipfile
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from passdeploy.checkpoint import Checkpoint
from passdeploy.data.base import ArraySplit, SubSplit
from passdeploy.errors import BadInput
from passdeploy.search.prompt import InputStage, Prompted
from passdeploy.tasks import get_task
from passdeploy.training import (
    LARGEST_GRADIENT,
    TrainSettings,
    evaluate,
    learning_rate,
    parameter_groups,
    reestimate_batch_norm,
    task_loss,
    train,
)
from tests import scripted

DATA = scripted.data()


class Stop(Exception):
    """Ends a training at a step."""


def model(kind: str = "additive") -> Prompted:
    torch.manual_seed(4)
    return Prompted(InputStage(DATA.preprocess, kind), scripted.tiny_resnet(3))


@pytest.fixture(autouse=True)
def _threads(one_thread: None) -> None:
    """All on one thread."""


@pytest.mark.parametrize(("total", "at"), [(9, [4, 9]), (10, [4, 8, 10]), (3, [3]), (8, [4, 8])])
def test_the_curves_last_point_is_no_single_step(total: int, at: list[int]) -> None:
    settings = TrainSettings(epochs=0, min_steps=total, batch=8)
    assert train(model(), DATA, settings, curve_every=4).step == at


@pytest.mark.parametrize("stop_at", [1, 5, 11, 15])
def test_resumed_bit_for_bit(tmp_path: Path, stop_at: int) -> None:
    settings = TrainSettings(epochs=0.1, min_steps=16, batch=16, distill=0.5, lr=0.05)
    teacher = model("none")
    whole, broken = model(), model()
    expected = train(whole, DATA, settings, teacher=teacher, curve_every=4)

    def stop(done: int, total: int, state: str) -> None:
        assert total == 16
        if done == stop_at:
            raise Stop

    checkpoint = tmp_path / "c.ckpt"
    with pytest.raises(Stop):
        train(
            broken,
            DATA,
            settings,
            teacher=teacher,
            curve_every=4,
            checkpoint=Checkpoint(checkpoint, 0, 0),
            progress=stop,
        )
    resumed = model()
    steps: list[int] = []
    curve = train(
        resumed, DATA, settings, teacher=teacher, curve_every=4, checkpoint=Checkpoint(checkpoint, 0, 0),
        progress=lambda done, total, state: steps.append(done),
    )  # fmt: skip
    assert steps[0] == stop_at + 1, "nothing that was due to be saved is trained again"
    assert vars(curve) == vars(expected)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_saving_takes_a_small_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    checkpoint = Checkpoint(tmp_path / "c.ckpt")

    def write(path: Path, content: bytes, seconds: list[float]) -> None:
        now[0] += seconds.pop(0)

    monkeypatch.setattr("passdeploy.checkpoint.write_atomic", partial(write, seconds=[3.0, 0.1]))
    for pause in (15, 60, 15):
        now[0] += pause - 1
        assert not checkpoint.due()
        now[0] += 1
        assert checkpoint.due()
        if pause != 15 or now[0] < 20:
            checkpoint.save({})


def test_a_damaged_checkpoint_never_replaces_a_good_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint(tmp_path / "c.ckpt", 0, 0)
    checkpoint.save({"step": 1, "t": torch.ones(2)})

    def fails(*_: object) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fails)
        with pytest.raises(Stop):
            checkpoint.save({"step": 2})
    loaded = checkpoint.load()
    assert loaded is not None
    assert loaded["step"] == 1
    assert Checkpoint(None).load() is None
    assert not Checkpoint(None).due()


def test_what_was_begun_on_a_gpu_goes_on_without_one(tmp_path: Path) -> None:
    """Its tensors say in the file where they were."""
    Checkpoint(tmp_path / "c.ckpt").save({"step": 3, "t": torch.ones(2)})
    with zipfile.ZipFile(tmp_path / "c.ckpt") as begun, zipfile.ZipFile(tmp_path / "gpu.ckpt", "w") as file:
        for entry in begun.infolist():
            content = begun.read(entry)
            if entry.filename.endswith("data.pkl"):
                assert content.count(b"\x03\x00\x00\x00cpu") == 1
                content = content.replace(b"\x03\x00\x00\x00cpu", b"\x06\x00\x00\x00cuda:0")
            file.writestr(entry.filename, content)
    loaded = Checkpoint(tmp_path / "gpu.ckpt").load()
    assert loaded is not None and loaded["step"] == 3
    assert loaded["t"].device.type == "cpu" and loaded["t"].tolist() == [1, 1]


@given(total=st.integers(1, 500), peak=st.floats(1e-4, 1), warmup=st.floats(0, 1))
def test_the_rate_rises_then_falls(total: int, peak: float, warmup: float) -> None:
    rates = [learning_rate(step, total, peak, warmup) for step in range(total)]
    assert all(0 <= rate <= peak + 1e-12 for rate in rates)
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)


def test_norms_biases_and_prompts_do_not_decay() -> None:
    network = model()
    decayed, free = parameter_groups(network, 5e-4)
    assert all(p.ndim > 1 for p in decayed["params"])
    assert any(p is network.stage.prompt for p in free["params"])
    assert len(decayed["params"]) + len(free["params"]) == len(list(network.parameters()))


def test_batch_norms_see_the_training_data() -> None:
    network = nn.Sequential(nn.BatchNorm2d(3))
    nn.init.constant_(network[0].running_mean, 9)  # type: ignore[arg-type]
    before = copy.deepcopy(network[0].weight)
    reestimate_batch_norm(Prompted(InputStage(DATA.preprocess), network), DATA, images=256, batch=64)
    images = DATA.train.images(torch.arange(len(DATA.train)))
    normalised = InputStage(DATA.preprocess)(images)
    norm = network[0]
    assert isinstance(norm, nn.BatchNorm2d)
    assert torch.allclose(norm.running_mean, normalised.mean((0, 2, 3)), atol=1e-4)  # type: ignore[arg-type]
    assert norm.momentum == 0.1
    assert torch.equal(norm.weight, before)


def test_the_last_images_count_no_more_than_others() -> None:
    split = scripted.stripes(258, 1)
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3))
    reestimate_batch_norm(network, dataclasses.replace(DATA, train=split), batch=256)
    means = split.images(torch.arange(258)).mean((2, 3))
    assert torch.allclose(network[1].running_var, means.var(0), rtol=0.05)  # type: ignore[arg-type]


def test_evaluation_counts() -> None:
    class Constant(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.tensor([0.0, 1.0, 0.0]).expand(len(images), 3)

    expected = float((DATA.test.labels == 1).float().mean())
    assert evaluate(Constant(), DATA.test, batch=7) == pytest.approx(expected)


def test_parameters_of_five_dimensions_are_trained() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.table = nn.Conv2d(3, 3, 3), nn.Parameter(torch.zeros(1, 1, 1, 1, 1))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.conv(images).mean((2, 3)) * (1 + self.table.sum())

    network = Table()
    settings = TrainSettings(epochs=0.01, min_steps=1, batch=16, warmup=0.0, distill=0.5)
    train(network, DATA, settings, teacher=copy.deepcopy(network))
    assert float(network.table.detach().abs()) > 0
    assert network.conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_training_that_diverges_says_so_in_a_line() -> None:
    settings = TrainSettings(epochs=0.1, min_steps=40, batch=16, lr=1e30, warmup=0.0)
    with pytest.raises(BadInput, match=r"diverged: the loss is (nan|inf) at step \d+; lower the learning rate"):
        train(model("none"), DATA, settings)


def test_a_gradient_that_is_no_number_is_named_before_it_is_in_the_weights() -> None:
    class Cusp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.zero = model("none"), nn.Parameter(torch.zeros(1))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.inner(images) + (self.zero * 0).abs().sqrt()  # type: ignore[no-any-return]

    cusp = Cusp()
    with pytest.raises(BadInput, match=r"diverged: the gradient's norm is nan at step 1; lower the learning rate"):
        train(cusp, DATA, TrainSettings(epochs=0.01, min_steps=1, batch=16, warmup=0.0))
    assert all(bool(parameter.isfinite().all()) for parameter in cusp.parameters())


def test_no_step_is_longer_than_a_gradient_may_be() -> None:
    """VGG-16 from scratch at the default rate on batches of 16 took steps after which its loss was nan."""
    steep = model("none")
    with torch.no_grad():
        for parameter in steep.network.fc.parameters():  # type: ignore[operator, union-attr]
            parameter.mul_(1e3)
    before = [p.detach().clone() for p in steep.parameters()]
    train(steep, DATA, TrainSettings(epochs=0.01, min_steps=1, batch=16, lr=0.1, warmup=0.0, weight_decay=0.0))
    moved = torch.cat([(p.detach() - q).flatten() for p, q in zip(steep.parameters(), before, strict=True)]).norm()
    assert 0.5 < moved / (0.1 * 1.9 * LARGEST_GRADIENT) <= 1.001  # Nesterov's first step: gradient times 1 + momentum


def test_large_images_are_evaluated_few_at_a_time() -> None:
    """As many pixels as 500 images of 96 x 96."""

    def split(side: int) -> ArraySplit:
        return ArraySplit(
            torch.zeros(1, 1, 1, 1, dtype=torch.uint8).expand(600, 3, side, side), torch.zeros(600).long()
        )

    sizes = []

    def seen(images: torch.Tensor) -> torch.Tensor:
        sizes.append(len(images))
        return torch.zeros(len(images), 2)

    network = nn.Module()
    network.forward = seen  # type: ignore[method-assign]
    evaluate(network, split(32))
    assert sizes == [2, 500, 100]  # the first: how they may lie
    sizes.clear()
    evaluate(network, SubSplit(split(960), torch.arange(12)))
    assert sizes == [2, 5, 5, 2]


def test_what_has_no_labels_that_count_was_not_judged() -> None:
    """0 % would be a measurement."""
    none = SubSplit(DATA.test, torch.arange(0))
    assert evaluate(model("none"), none) is None
    ignored = ArraySplit(DATA.test.pixels[:4], torch.full((4,), -100))  # type: ignore[union-attr]
    assert evaluate(model("none"), ignored) is None


def test_accuracies_and_statistics_are_in_single_precision() -> None:
    """On GPUs PyTorch gives convolutions TF32 by default, with 10 bits of mantissa; the engine has none of it."""
    seen = []

    class Watching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            seen.append((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
            return self.norm(images).mean((2, 3))

    before = torch.backends.cudnn.allow_tf32
    model = Watching()
    evaluate(model, DATA.test)
    count = len(seen)
    reestimate_batch_norm(model, DATA)
    assert 0 < count < len(seen) and set(seen) == {(False, False)}
    assert torch.backends.cudnn.allow_tf32 is before


def test_a_loss_of_ones_own_gets_single_precision() -> None:
    """Under autocast outputs are bfloat16 where the CPU is quick at it, and a loss with weights of its own breaks."""

    class Weighted(type(get_task("classification"))):  # type: ignore[misc]
        name = "weighted"

        def loss(self, outputs: torch.Tensor, labels: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
            return nn.functional.cross_entropy(outputs, labels.long(), weight=torch.tensor([1.0, 2.0, 3.0]))

    logits = torch.randn(4, 3, dtype=torch.bfloat16)
    assert task_loss(Weighted(), logits, torch.tensor([0, 1, 2, 0]), None, TrainSettings()).dtype == torch.float32
