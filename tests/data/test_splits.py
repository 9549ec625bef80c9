from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from passdeploy.config import make_config
from passdeploy.data.base import ArraySplit, SubSplit, check_data, evenly, split_train_val
from passdeploy.errors import BadInput
from passdeploy.subject import load_subject
from tests import scripted


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
        (torch.tensor([0, 1]), "3 images but 2 labels"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels: torch.Tensor, message: str) -> None:
    data = scripted.data()
    data.val = ArraySplit(torch.zeros(3, 3, *scripted.SIZE, dtype=torch.uint8), labels)
    config = make_config({"model": "tiny-resnet", "data": "stripes"})
    with pytest.raises(BadInput, match=f"stripes: val: {message}"):
        load_subject(config, data=data)


def test_pixels_of_no_class_are_no_mistake() -> None:
    masks = torch.tensor([0, 2, 255], dtype=torch.uint8).repeat(3, 4, 1)
    split = ArraySplit(torch.zeros(3, 3, 4, 3, dtype=torch.uint8), masks)
    data = dataclasses.replace(scripted.data(), train=split, val=split, test=split)
    check_data(data, ignore=255)
    with pytest.raises(BadInput, match="labels go from 0 to 255"):
        check_data(data, ignore=-100)


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
