from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from passdeploy import data as datasets
from passdeploy.config import make_config
from passdeploy.data.base import (
    ArraySplit,
    Preprocess,
    ResizedSplit,
    Split,
    SubSplit,
    evenly,
    resized,
    split_train_val,
)
from passdeploy.data.checks import check_data
from passdeploy.data.images import fit
from passdeploy.errors import BadInput
from passdeploy.subject import load_subject
from passdeploy.tasks import get_task, task_of
from tests import scripted
from tests.data.test_fashion_mnist import needs_data


def by_class(*counts: int) -> ArraySplit:
    """Sorted by class, as image folders are; every pixel is its class."""
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return ArraySplit(labels.to(torch.uint8)[:, None, None, None].expand(-1, 3, *scripted.SIZE), labels)


def test_images_are_taken_from_the_whole_split() -> None:
    split = by_class(100, 100, 100)
    indices = evenly(split, 30)
    assert len(indices.unique()) == 30
    assert split.labels[indices].bincount().tolist() == [10, 10, 10]


def test_of_a_small_split_all_are_taken_equally_often() -> None:
    assert evenly(by_class(1, 1, 1), 9).bincount().tolist() == [3, 3, 3]


def test_proofs_calibration_and_samples_see_every_class(tmp_path: Path) -> None:
    run = scripted.start(tmp_path / "run")
    run.subject.data.val = by_class(100, 100, 100)
    for images in (run.validation_images, run.calibration_images, run.sampled_images(8)):
        assert torch.from_numpy(images).mul(255).round().unique().tolist() == [0, 1, 2]
    assert len(run.calibration_images) == 256


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.arange(1, 4), "labels go from 1 to 3, 3 classes have 0 to 2"),
        (torch.tensor([-1, 0, 1]), "labels go from -1 to 1"),
        (torch.zeros(3), "labels are torch.float32, must be whole numbers"),
        (torch.zeros(3, dtype=torch.uint8), "labels are torch.uint8, must be int64"),
        (torch.tensor([0, 1]), "3 images but 2 labels"),
        (np.arange(3), "labels are ndarray, must be a tensor"),
        (torch.zeros(3, dtype=torch.uint16), "labels are torch.uint16, must be whole numbers in int64"),
        (
            torch.zeros(3, *scripted.SIZE, dtype=torch.int64),
            r"labels are \(3, 16, 12\), must be \(3,\); give one label",
        ),
        (torch.zeros(3, 1, dtype=torch.int64), r"labels are \(3, 1\), must be \(3,\); give one label an image"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels: Any, message: str) -> None:
    data = scripted.data()
    data.val = ArraySplit(torch.zeros(3, 3, *scripted.SIZE, dtype=torch.uint8), labels)
    config = make_config({"model": "tiny-resnet", "data": "stripes"})
    with pytest.raises(BadInput, match=f"stripes: val: {message}"):
        load_subject(config, data=data)


def test_one_class_leaves_nothing_to_tell_apart() -> None:
    single = ArraySplit(PIXELS, torch.zeros(3, dtype=torch.int64))
    data = dataclasses.replace(scripted.data(), classes=("cat",), train=single, val=single, test=single)
    with pytest.raises(BadInput, match=r"stripes: 1 class\(es\); two or more are needed"):
        check_data(data, get_task("classification"))


def test_a_list_of_labels_is_refused_before_its_task_is_asked_for() -> None:
    data = scripted.data()
    data.train = ArraySplit(torch.zeros(3, 3, *scripted.SIZE, dtype=torch.uint8), [0, 1, 2])  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="stripes: train: labels are list, must be a tensor"):
        load_subject(make_config({"model": "tiny-resnet", "data": "stripes"}), data=data)


class Scaled(ArraySplit):
    """A split of one's own: values as they lie in the tensor."""

    def images(self, indices: torch.Tensor) -> torch.Tensor:
        return self.pixels[indices].float()


@dataclasses.dataclass
class Given(ArraySplit):
    """A split of one's own that returns whatever this makes of its images."""

    make: Callable[[torch.Tensor], Any]

    def images(self, indices: torch.Tensor) -> torch.Tensor:
        return self.make(super().images(indices))  # type: ignore[no-any-return]


LABELS = torch.arange(3)
PIXELS = torch.zeros(3, 3, *scripted.SIZE, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (ArraySplit(torch.rand(3, 3, *scripted.SIZE), LABELS), "pixels are torch.float32, must be torch.uint8"),
        (ArraySplit(torch.zeros(3, 3, *scripted.SIZE, dtype=torch.uint16), LABELS), "pixels are torch.uint16"),
        (SubSplit(ArraySplit(torch.rand(3, 3, *scripted.SIZE), LABELS), LABELS), "pixels are torch.float32"),
        (ArraySplit(np.zeros((3, 3, *scripted.SIZE), np.uint8), LABELS), "pixels are ndarray"),  # type: ignore[arg-type]
        (
            ArraySplit(torch.zeros(3, 3, 8, 12, dtype=torch.uint8), LABELS),
            r"images are \(3, 8, 12\), declared are \(3, 16, 12\); set Preprocess.size",
        ),
        (
            Scaled(torch.full((3, 3, *scripted.SIZE), 200, dtype=torch.uint8), LABELS),
            r"images go from 200 to 200, must lie in \[0, 1\]; divide",
        ),
        (
            Given(PIXELS, LABELS, torch.Tensor.double),
            "images are torch.float64 on cpu, must be a tensor of torch.float32",
        ),
        (Given(PIXELS, LABELS, torch.Tensor.numpy), "images are of type ndarray, must be a tensor of torch.float32"),
        (Given(PIXELS, LABELS, lambda images: images.to("meta")), "images are torch.float32 on meta, .* on the CPU"),
        (Given(PIXELS, LABELS, lambda images: images[:1]), "1 images for 3 indices; return one for each"),
    ],
)
def test_images_that_are_not_what_is_declared_are_refused(split: Split, message: str) -> None:
    data = scripted.data()
    data.val = split
    with pytest.raises(BadInput, match=f"stripes: val: {message}"):
        load_subject(make_config({"model": "tiny-resnet", "data": "stripes"}), data=data)


@pytest.mark.parametrize("change", [{"mean": (123.675, 116.28, 103.53)}, {"std": (0.2, 0.0, 0.2)}, {"mean": (0.5,)}])
def test_a_normalisation_that_is_not_for_values_up_to_1_is_refused(change: dict[str, Any]) -> None:
    data = scripted.data()
    data.preprocess = dataclasses.replace(data.preprocess, **change)
    with pytest.raises(BadInput, match=r"not for RGB images in \[0, 1\].*divide both by 255"):
        load_subject(make_config({"model": "tiny-resnet", "data": "stripes"}), data=data)
    config = make_config({"model": "tiny-resnet", "data": "stripes", "mean": (104, 117, 124), "std": (1, 1, 1)})
    with pytest.raises(BadInput, match=r"mean \(104.0, 117.0, 124.0\) and std"):
        load_subject(config, data=scripted.data())


def test_what_a_split_of_ones_own_fails_with_is_said() -> None:
    class Broken(ArraySplit):
        def images(self, indices: torch.Tensor) -> torch.Tensor:
            raise KeyError("cat.png")

    data = scripted.data()
    data.test = Broken(data.test.pixels, data.test.labels)  # type: ignore[attr-defined]
    with pytest.raises(BadInput, match=r"stripes: test: asking for images failed: KeyError: 'cat\.png'"):
        load_subject(make_config({"model": "tiny-resnet", "data": "stripes"}), data=data)


def test_nothing_to_cut_a_validation_split_from() -> None:
    with pytest.raises(BadInput, match="no training images"):
        split_train_val(ArraySplit(torch.zeros(0, 3, 4, 4, dtype=torch.uint8), torch.zeros(0).long()), 0.1, seed=0)


def test_label_maps_have_the_size_of_the_images() -> None:
    split = ArraySplit(torch.zeros(3, 3, *scripted.SIZE, dtype=torch.uint8), torch.zeros(3, 8, 6, dtype=torch.uint8))
    data = dataclasses.replace(scripted.data(), train=split, val=split, test=split)
    with pytest.raises(BadInput, match=r"train: labels are \(3, 8, 6\), must be \(3, 16, 12\); give"):
        check_data(data, task_of(data))


def test_a_label_per_image_is_none_per_pixel() -> None:
    data = dataclasses.replace(scripted.data(), task="segmentation")
    with pytest.raises(BadInput, match=r"train: labels are \((\d+),\), must be \(\1, 16, 12\); give maps"):
        check_data(data, task_of(data))


def test_a_loss_of_ones_own_takes_labels_of_its_own_but_the_same_in_all_splits() -> None:
    class Tags(type(get_task("classification"))):  # type: ignore[misc]
        name = "tags"

        def loss(self, outputs: torch.Tensor, labels: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
            return torch.nn.functional.binary_cross_entropy_with_logits(outputs, labels.float())

    tags = ArraySplit(PIXELS, torch.eye(3).long())
    data = dataclasses.replace(scripted.data(), train=tags, val=tags, test=tags)
    check_data(data, Tags())
    one = ArraySplit(PIXELS, torch.zeros(3, 1, dtype=torch.int64))
    check_data(dataclasses.replace(data, classes=("there",), train=one, val=one, test=one), Tags())
    data.test = ArraySplit(PIXELS, LABELS)
    with pytest.raises(BadInput, match=r"test: labels are \(3,\), must be \(3, 3\)"):
        check_data(data, Tags())


def test_pixels_of_no_class_are_no_mistake() -> None:
    masks = torch.tensor([0, 2, 255], dtype=torch.uint8).repeat(3, 4, 1)
    split = ArraySplit(torch.zeros(3, 3, 4, 3, dtype=torch.uint8), masks)
    data = dataclasses.replace(scripted.data(), preprocess=Preprocess((4, 3)), train=split, val=split, test=split)
    check_data(data, get_task("segmentation"))
    with pytest.raises(BadInput, match="labels go from 0 to 255"):
        check_data(data, get_task("classification"))


def test_of_a_class_per_pixel_the_validation_split_is_cut_at_random() -> None:
    masks = torch.randint(0, 3, (50, 4, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole = ArraySplit(torch.arange(50, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 4, 3), masks)
    train, val = split_train_val(whole, fraction=0.2, seed=0)
    assert (len(train), len(val)) == (40, 10)
    assert isinstance(val, SubSplit)
    assert isinstance(train, SubSplit)
    assert sorted([*train.indices.tolist(), *val.indices.tolist()]) == list(range(50))
    again = split_train_val(whole, fraction=0.2, seed=0)[1]
    assert isinstance(again, SubSplit)
    assert torch.equal(again.indices, val.indices)


@needs_data
@pytest.mark.parametrize("size", [(56, 56), (14, 20)])
def test_a_named_set_is_resized_as_its_files_would_be(size: tuple[int, int]) -> None:
    small, large = datasets.load("fashion-mnist"), datasets.load("fashion-mnist", size=size)
    assert (large.preprocess.size, large.input_shape) == (size, (3, *size))
    assert large.augmentation.shift == round(2 * min(size) / 28)
    assert large.digest() != small.digest()
    which = torch.arange(4)
    assert torch.equal(large.test.labels, small.test.labels)
    for image, bigger in zip(small.test.images(which), large.test.images(which), strict=True):
        pixels = Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())
        expected = np.asarray(fit(pixels, size, None)).transpose(2, 0, 1).astype(int)
        assert np.abs(expected - (bigger * 255).numpy()).max() <= 1  # Pillow rounds between its two passes too


def test_at_its_own_size_a_set_is_left_as_it_is() -> None:
    data = scripted.data()
    assert resized(data, data.preprocess.size) is data


def test_classes_of_pixels_are_resized_without_new_ones() -> None:
    masks = torch.tensor([[0, 7], [255, 3]], dtype=torch.uint8)[None]
    split = ResizedSplit(ArraySplit(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), masks), (4, 4))
    assert torch.equal(split.labels, masks.repeat_interleave(2, 1).repeat_interleave(2, 2))
    assert len(split) == 1


def test_a_set_that_was_cut_is_not_resized_again() -> None:
    data = dataclasses.replace(scripted.data(), preprocess=Preprocess(scripted.SIZE, resize=20))
    with pytest.raises(BadInput, match="leave input_size out"):
        resized(data, (8, 8))


def test_a_split_that_draws_at_random_is_refused() -> None:
    """Its digest would be another one in each process: nothing could be resumed."""

    class Random(ArraySplit):
        def images(self, indices: torch.Tensor) -> torch.Tensor:
            return torch.rand(len(indices), 3, 16, 12)

    data = dataclasses.replace(scripted.data(), train=Random(PIXELS, LABELS))
    with pytest.raises(BadInput, match="train: the same indices give other images each time"):
        check_data(data, task_of(data))
