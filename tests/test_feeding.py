"""What training is fed with is a function of the seed and the step, whoever makes it and when."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from passdeploy.config import make_config
from passdeploy.data.base import Augmentation
from passdeploy.feeding import augment, training_batches
from tests import scripted

DATA = scripted.data()


def test_the_largest_seed_is_one() -> None:
    seed = make_config({"seed": 2**32 - 1}).seed
    (step, _, _) = next(training_batches(DATA, 32, seed, 10_000_001, start=10_000_000))
    assert step == 10_000_000


def test_batches_are_a_function_of_seed_and_step() -> None:
    whole = list(training_batches(DATA, 32, 5, 20))
    rest = list(training_batches(DATA, 32, 5, 20, start=11))
    assert [step for step, _, _ in rest] == list(range(11, 20))
    for (step, images, labels), (again, same_images, same_labels) in zip(whole[11:], rest, strict=True):
        assert step == again
        assert torch.equal(images, same_images)
        assert torch.equal(labels, same_labels)
    other = next(training_batches(DATA, 32, 6, 1))
    assert not torch.equal(other[1], whole[0][1])
    per_epoch = len(DATA.train) // 32
    seen = torch.cat([labels for _, _, labels in whole[:per_epoch]])
    assert seen.bincount().tolist() == DATA.train.labels.bincount().tolist()


def test_augmented_images_are_shifted_or_mirrored_ones() -> None:
    images = torch.rand(40, 3, 9, 7)
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(augment(images, Augmentation(flip=False, shift=0), generator), images)
    flipped = augment(images, Augmentation(flip=True, shift=0), generator)
    same = (flipped == images).flatten(1).all(1)
    mirrored = (flipped == images.flip(3)).flatten(1).all(1)
    assert (same | mirrored).all()
    assert same.any()
    assert mirrored.any()
    moved = augment(images, Augmentation(flip=False, shift=2), generator)
    inner = moved[:, :, 4:5, 3:4]
    near = images[:, :, 2:7, 1:6].flatten(2)
    assert (inner.flatten(2) == near).any(2).all()


def by_indices(images: torch.Tensor, how: Augmentation, generator: torch.Generator) -> torch.Tensor:
    """What `augment` does, pixel by pixel."""
    count, _, height, width = images.shape
    top, left = torch.zeros(2, count, dtype=torch.int64)
    if how.shift:
        top, left = torch.randint(0, 2 * how.shift + 1, (2, count), generator=generator) - how.shift
    rows = (top[:, None] + torch.arange(height)).clamp(0, height - 1)
    columns = (left[:, None] + torch.arange(width)).clamp(0, width - 1)
    moved = images.gather(2, rows[:, None, :, None].expand_as(images))
    moved = moved.gather(3, columns[:, None, None, :].expand_as(images))
    if how.flip:
        flipped = torch.rand(count, generator=generator) < 0.5
        moved = torch.where(flipped[:, None, None, None], moved.flip(3), moved)
    return moved


@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    how=st.builds(Augmentation, flip=st.booleans(), shift=st.integers(0, 12)),
    seed=st.integers(0, 2**32),
    last=st.booleans(),
)
def test_augmentation_is_what_it_says(size: tuple[int, int], how: Augmentation, seed: int, last: bool) -> None:
    """The very values, however the images lie, also where a shift is as large as an image."""
    images = torch.rand(6, 3, *size, generator=torch.Generator().manual_seed(seed))
    if last:
        images = images.contiguous(memory_format=torch.channels_last)
    before = images.clone()
    got = augment(images, how, torch.Generator().manual_seed(seed))
    assert torch.equal(got, by_indices(images, how, torch.Generator().manual_seed(seed)))
    assert torch.equal(images, before), "the images themselves are left alone: they may be kept"
