from __future__ import annotations

from pathlib import Path

import torch

from passdeploy.data.base import ArraySplit, evenly
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
