from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from passdeploy import models
from passdeploy.config import make_config, merge
from passdeploy.data.base import ArraySplit, Augmentation, ImageData, Preprocess
from passdeploy.data.fashion_scenes import SIDE, scenes
from passdeploy.errors import BadInput
from passdeploy.feeding import training_batches
from passdeploy.models.unet import UNet
from passdeploy.subject import load_subject
from passdeploy.tasks import get_task, known, task_of
from passdeploy.tasks.base import Task, registered
from passdeploy.training import TrainSettings, evaluate, train
from tests import scripted

CLASSES = 3


@pytest.mark.parametrize("value", [93.1, -0.2, float("nan")])
def test_a_metric_that_is_no_share_is_refused_where_it_is_first_asked_for(value: float) -> None:
    """Reports hold shares, and the next to notice would be the report, after hours."""
    metric = SimpleNamespace(add=lambda outputs, labels: None, value=lambda: value)
    task = SimpleNamespace(name="kappa", ignore=-100, metric=lambda classes: metric)
    split = ArraySplit(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.zeros(4, dtype=torch.long))
    with pytest.raises(BadInput, match=r"task kappa is .* has to lie in"):
        evaluate(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), split, task=task)  # type: ignore[arg-type]


def squares(count: int, seed: int) -> ArraySplit:
    """16x16: a bright and a dark square on grey, a class each."""
    rng = np.random.default_rng(seed)
    pixels = rng.normal(128, 10, (count, 3, 16, 16))
    masks = np.zeros((count, 16, 16), np.uint8)
    for i in range(count):
        for label, value in ((1, 220), (2, 40)):
            top, left = rng.integers(0, 11, 2)
            pixels[i, :, top : top + 6, left : left + 6] = value
            masks[i, top : top + 6, left : left + 6] = label
    return ArraySplit(torch.from_numpy(pixels.clip(0, 255).astype(np.uint8)), torch.from_numpy(masks))


def data() -> ImageData:
    return ImageData(
        "squares", ("grey", "bright", "dark"), Preprocess((16, 16)), Augmentation(True, 2),
        squares(128, 1), squares(40, 2), squares(40, 3),
    )  # fmt: skip


@models.register("tiny-unet")
def tiny_unet(num_classes: int = CLASSES) -> nn.Module:
    """Two levels."""
    return UNet(num_classes, width=16, depth=2)


def test_images_that_do_not_count_are_no_mistakes() -> None:
    metric = get_task("classification").metric(2)
    metric.add(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]), torch.tensor([0, 0, -100]))
    assert metric.value() == 0.5


@pytest.mark.parametrize("ignored", [0, 2, -1])
@pytest.mark.parametrize(("name", "places"), [("classification", (6,)), ("segmentation", (6, 4, 3))])
def test_what_a_derived_task_ignores_its_metric_ignores(name: str, places: tuple[int, ...], ignored: int) -> None:
    """Its loss does so by the attribute; the number of a class, too, may be the one that counts nowhere."""
    task = type("Derived", (type(get_task(name)),), {"name": "derived", "ignore": ignored})()
    outputs, labels = torch.zeros(6, 3, *places[1:]), torch.full(places, 1)
    outputs[:3, 1], outputs[3:, max(ignored, 0)] = 1.0, 1.0  # right, and what would be right of those that do not count
    labels[3:] = ignored
    metric = task.metric(3)
    metric.add(outputs, labels)
    assert metric.value() == 1.0
    right, counted = task.right(outputs, labels)
    assert right == counted == labels[:3].numel()


def test_the_code_of_a_task_of_ones_own_is_an_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is what trained and judged all that lies in a run directory."""
    monkeypatch.syspath_prepend(tmp_path)
    config, found = make_config({"model": "tiny-resnet", "data": "stripes"}), []
    for module, ignored in (("judged_so", -1), ("judged_alike", -1), ("judged_otherwise", 2)):
        (tmp_path / f"{module}.py").write_text(
            "from passdeploy.tasks.classification import Classification\n"
            "class Mine(Classification):\n"
            "    name = 'mine'\n"
            f"    ignore = {ignored}\n"
        )
        monkeypatch.setitem(registered(), "mine", importlib.import_module(module).Mine())
        mine = dataclasses.replace(scripted.data(), task="mine")
        found.append(load_subject(config, data=mine).data_digest)
    assert found[0] == found[1] != found[2]
    assert load_subject(config, data=scripted.data()).data_digest == scripted.data().digest()


def test_the_task_follows_from_the_labels() -> None:
    assert known() == ["classification", "segmentation"]
    assert task_of(data()).name == "segmentation"
    assert task_of(scripted.data()).name == "classification"
    odd = dataclasses.replace(data(), train=ArraySplit(torch.zeros(2, 3, 4, 4), torch.zeros(2, 4)))
    with pytest.raises(BadInput, match=r"labels of shape \(2, 4\) belong to no built-in task"):
        task_of(odd)


@given(st.integers(2, 6), st.integers(0, 1000))
def test_mean_iou_against_sets(classes: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.rand(3, classes, 5, 4, generator=generator)
    labels = torch.randint(0, classes, (3, 5, 4), generator=generator)
    labels[torch.rand(3, 5, 4, generator=generator) < 0.2] = 255
    metric = get_task("segmentation").metric(classes)
    for part in (slice(0, 2), slice(2, 3)):
        metric.add(outputs[part], labels[part])
    chosen, counts = outputs.argmax(1), labels != 255
    expected = []
    for k in range(classes):
        a, b = (chosen == k) & counts, (labels == k) & counts
        if bool((a | b).any()):
            expected.append(float((a & b).sum()) / float((a | b).sum()))
    assert metric.value() == pytest.approx(float(np.mean(expected)))


def test_pixels_that_do_not_count_change_nothing() -> None:
    task = get_task("segmentation")
    outputs = torch.randn(2, 4, 6, 6)
    labels = torch.randint(0, 4, (2, 6, 6)).to(torch.uint8)
    labels[:, 3:] = 255
    assert torch.allclose(task.loss(outputs, labels), task.loss(outputs[:, :, :3], labels[:, :3]))
    assert task.right(outputs, labels) == task.right(outputs[:, :, :3], labels[:, :3])


def test_batches_without_a_pixel_that_counts_teach_nothing(one_thread: None) -> None:
    split = squares(16, 1)
    split.labels[2:] = 255
    network = UNet(CLASSES, width=8, depth=2)
    curve = train(network, dataclasses.replace(data(), train=split), TrainSettings(epochs=2, batch=4), curve_every=1)
    assert 0 in curve.loss
    assert np.isfinite(curve.loss).all()
    assert all(parameter.isfinite().all() for parameter in network.parameters())


def test_divergence_is_per_place() -> None:
    for name, shape in (("classification", (6, 4)), ("segmentation", (6, 4, 3, 3))):
        task, reference = get_task(name), torch.randn(shape)
        assert float(task.divergence(reference, reference)) == pytest.approx(0, abs=1e-6)
        got = torch.randn(shape)
        rows = [get_task("classification").divergence(a, b) for a, b in _places(got, reference)]
        assert float(task.divergence(got, reference)) == pytest.approx(float(torch.stack(rows).mean()), rel=1e-4)


def _places(a: torch.Tensor, b: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    flat = [t.reshape(*t.shape[:2], -1).unbind(2) for t in (a, b)]
    return list(zip(*flat, strict=True))


def test_labels_are_augmented_with_their_images() -> None:
    split = squares(32, 5)
    same = ArraySplit(split.labels[:, None].repeat(1, 3, 1, 1), split.labels)  # the image shows the labels
    images = dataclasses.replace(data(), train=same)
    for _, pixels, labels in training_batches(images, 8, 0, 6):
        assert labels.dtype == torch.uint8
        assert torch.equal((pixels[:, 0] * 255).round().to(torch.uint8), labels)


def test_a_segmentation_network_learns(one_thread: None) -> None:
    torch.manual_seed(0)
    network = UNet(CLASSES, width=8, depth=2)
    before = evaluate(network, data().test)
    curve = train(network, data(), TrainSettings(min_steps=40, batch=8, lr=0.1))
    assert evaluate(network, data().test) > max(0.6, before + 0.1)
    assert curve.accuracy[-1] > 0.8


@pytest.mark.parametrize(
    ("network", "said"),
    [
        (nn.Sequential(nn.Conv2d(3, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()), r"returned \(2, 3\)"),
        (nn.Conv2d(3, 5, 1), "has 5 outputs, squares has 3 classes"),
        (nn.Conv2d(3, 3, 1, stride=2), "scale its output to the size of the images"),
    ],
)
def test_outputs_of_another_task_are_refused(network: nn.Module, said: str) -> None:
    config = make_config({"model": "x", "data": "squares"})
    with pytest.raises(BadInput, match=said) as caught:
        load_subject(config, model=network, data=data())
    assert "\n" not in str(caught.value)


def test_a_dictionary_is_no_output() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"out": self.conv(x)}

    with pytest.raises(BadInput, match="returned dict; return one tensor"):
        load_subject(make_config({"model": "x", "data": "squares"}), model=Two(), data=data())


def test_pixels_that_move_away_from_their_labels_are_refused() -> None:
    config = make_config({"model": "x", "data": "squares", "prompt": {"kind": "expansive", "width": 2}})
    with pytest.raises(BadInput, match=r"set prompt\.kind to additive or none"):
        load_subject(config, model=tiny_unet(), data=data())


@pytest.mark.parametrize("shape", [(CLASSES, 16), (CLASSES + 1,), ()])
def test_outputs_that_cannot_be_shipped_are_refused_at_the_start(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]
) -> None:
    monkeypatch.setattr(type(task_of(data())), "output_shape", lambda *_: shape)
    with pytest.raises(BadInput, match=r"only \(3,\) and \(3, H, W\), the classes of squares first"):
        load_subject(make_config({"model": "x", "data": "squares"}), model=tiny_unet(), data=data())


def test_a_task_that_the_data_is_not_for() -> None:
    config = make_config({"model": "x", "data": "squares", "task": "classification"})
    with pytest.raises(BadInput, match="--task classification: squares is for segmentation"):
        load_subject(config, model=tiny_unet(), data=data())
    with pytest.raises(BadInput, match="no such task; did you mean segmentation"):
        load_subject(make_config({"model": "x", "data": "squares", "task": "segmentatoin"}), tiny_unet(), data())


def test_scenes_show_what_their_masks_say() -> None:
    articles = np.full((4, 28, 28), 200, np.uint8)
    articles[:, :, :14] = 0
    made, again = (scenes(articles, np.array([0, 3, 5, 9]), 12, 7) for _ in range(2))
    assert torch.equal(made.pixels, again.pixels)
    assert made.labels.shape == (12, SIDE, SIDE)
    assert set(made.labels.unique().tolist()) <= {0, 1, 4, 6, 10}
    for k in range(12):
        inside = made.labels[k] > 0
        assert bool(inside.any())
        assert set(made.pixels[k, 0][inside].tolist()) == {200}


def test_a_segmentation_network_through_the_whole_run(one_thread: None, tmp_path: Path) -> None:
    from passdeploy.console import Ui
    from passdeploy.pipeline import Run

    values = merge(
        scripted.SETTINGS,
        {
            "model": "tiny-unet", "data": "squares", "latency": "1.3x", "task": "segmentation",
            "dense": {"epochs": 1, "min_steps": 20}, "search": {"epochs": 0.5, "min_steps": 20},
            "profile": {"structures": 12}, "epochs": 1,
        },
    )  # fmt: skip
    reports = Run(make_config(values), tmp_path / "run", Ui(quiet=True), data=data()).run()
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert reports[0].status == report["status"] == "within_budget"
    assert 0.3 < report["pruned"]["accuracy"] <= 1
    assert report["equivalence"]["top1_agreement"] >= 0.99
    assert max(report["equivalence"][k] for k in ("masked_vs_thin", "thin_vs_onnx", "onnx_vs_engine")) <= 1e-4
    assert any("mean intersection over union" in message for message in report["messages"])
    assert report["provenance"]["metric"] == "mean intersection over union"
    for page in ("report.html", "report.md"):
        said = (tmp_path / "run" / page).read_text()
        assert "top-1 accuracy" not in said
        assert "ean intersection over union" in said


class Depth(Task):
    """A task of one's own: a number per pixel."""

    name = "depth"

    def loss(self, outputs: torch.Tensor, labels: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
        return nn.functional.mse_loss(outputs[:, 0], labels.float())


def test_labels_per_pixel_move_with_their_images_whatever_the_task() -> None:
    labels = torch.arange(4 * 8 * 6).reshape(4, 8, 6)
    images = (labels[:, None] / 192).expand(-1, 3, -1, -1).contiguous()
    generator = torch.Generator().manual_seed(0)
    moved, where = Depth().augment(images, labels, Augmentation(flip=True, shift=2), generator)
    assert not torch.equal(where, labels) and where.dtype == labels.dtype
    torch.testing.assert_close(moved[:, 0] * 192, where.float())


class Share:
    """A metric of several labels an image: how many are right."""

    def __init__(self) -> None:
        self.right, self.seen = 0, 0

    def add(self, outputs: torch.Tensor, labels: torch.Tensor) -> None:
        self.right += int(((outputs > 0) == (labels > 0)).sum())
        self.seen += labels.numel()

    def value(self) -> float:
        return self.right / max(1, self.seen)


class Tags(Task):
    """A task of one's own: several labels an image, or one that is there or not."""

    name = "tags"

    def metric(self, classes: int) -> Share:
        return Share()


@pytest.mark.parametrize("classes", [1, 3])
def test_the_curve_of_labels_that_are_no_places_is_the_metric(classes: int) -> None:
    outputs = torch.tensor([[1.0], [-1.0], [1.0], [1.0]]).expand(4, classes)
    assert Tags().right(outputs, torch.tensor([[1], [0], [1], [0]]).expand(4, classes)) == (3, 4)


def test_a_single_output_is_a_number() -> None:
    """Softmax would make of every one the same."""
    reference = torch.randn(64, 1, generator=torch.Generator().manual_seed(0))
    assert Tags().divergence(reference, reference).item() == 0
    assert Tags().divergence(torch.zeros_like(reference), reference).item() == pytest.approx(1, rel=0.1)
    assert Tags().divergence(0.9 * reference, reference) < Tags().divergence(0.5 * reference, reference)
    assert Tags().agreement(-reference, reference) == 0 and Tags().agreement(2 * reference, reference) == 1
