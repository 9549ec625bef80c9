"""Batches made ahead are those made in turn, come in their order, and leave nothing behind however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from passdeploy import feeding
from passdeploy.data import ahead as module
from passdeploy.data import batches, folder
from passdeploy.data import images as decoding
from passdeploy.data.ahead import DEPTH, LARGE, ahead, images_of, worthwhile
from passdeploy.data.base import ArraySplit, Augmentation, ImageData, ResizedSplit, SubSplit
from passdeploy.data.folder import load_folder
from passdeploy.errors import BadInput
from passdeploy.feeding import training_batches
from passdeploy.tasks import Task
from passdeploy.tasks.base import register, registered
from passdeploy.tasks.classification import Classification
from tests.data.test_folder import fill

SOON = 60
"""Seconds after which something has hung."""


class Stop(Exception):
    """Ends a loop."""


def at_work() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("passdeploy-ahead")]


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ImageData:
    """A folder whose files are decoded each time."""
    monkeypatch.setattr(folder, "CACHE_BYTES", 0)
    monkeypatch.setattr(folder, "CHECK_PIXELS", 0)
    return load_folder(fill(tmp_path, {"red": 30, "green": 30}, suffix=".jpg"))


def test_results_come_in_order_whichever_is_ready_first() -> None:
    def make(item: int) -> int:
        time.sleep(0.02 if item % 3 == 0 else 0)
        return item

    assert list(ahead(make, range(20), depth=4)) == list(range(20))
    assert list(ahead(make, [])) == []
    assert not at_work()


def test_the_next_is_made_while_one_is_used() -> None:
    begun = [threading.Event() for _ in range(4)]

    def make(item: int) -> int:
        begun[item].set()
        return item

    results = ahead(make, range(4))
    assert next(results) == 0
    assert begun[DEPTH].wait(SOON), "nothing was asked of it meanwhile"
    results.close()


def test_no_more_are_there_than_were_asked_for_and_none_is_kept() -> None:
    class Result:
        """What may be referred to weakly."""

    lock, made, alive = threading.Lock(), 0, weakref.WeakSet[Result]()

    def make(item: int) -> Result:
        nonlocal made
        result = Result()
        with lock:
            made += 1
            alive.add(result)
        return result

    results = ahead(make, range(30))
    for used in range(1, 31):
        result = next(results)
        time.sleep(0.002)  # for more to be made, were there no bound
        with lock:
            assert made <= used + DEPTH
            assert len(alive) <= 1 + DEPTH
        del result
    assert next(results, None) is None
    assert not alive


def test_what_goes_wrong_is_raised_in_its_place() -> None:
    def make(item: int) -> int:
        if item >= 3:
            raise BadInput(f"file {item}")
        return item

    got: list[int] = []
    with pytest.raises(BadInput, match="file 3"):
        got.extend(ahead(make, range(9), depth=4))
    assert not at_work()
    results = ahead(make, range(9), depth=4)
    assert [next(results) for _ in range(3)] == [0, 1, 2], "what was made before is not lost"
    with pytest.raises(BadInput, match="file 3"):
        next(results)
    assert not at_work()


def breaks(data: ImageData) -> None:
    for step, _, _ in training_batches(data, 8, 0, 1000):
        if step == 2:
            break


def raises(data: ImageData) -> None:
    with pytest.raises(Stop):
        for _ in training_batches(data, 8, 0, 1000):
            raise Stop


def closes(data: ImageData) -> None:
    made = training_batches(data, 8, 0, 1000)
    next(made)
    made.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("stop", [breaks, raises, closes])
def test_stopped_early_no_thread_is_left(photos: ImageData, stop: Callable[[ImageData], None]) -> None:
    assert worthwhile(photos.train, 8)
    stop(photos)
    assert not at_work()


@pytest.mark.parametrize("cores", [1, 2, 3, 9])
def test_the_same_batches_however_many_cores(photos: ImageData, monkeypatch: pytest.MonkeyPatch, cores: int) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(feeding, "worthwhile", lambda *_: False)
        expected = [(*batch, torch.rand(3)) for batch in training_batches(photos, 8, 3, 17)]
    monkeypatch.setattr(decoding, "usable_cores", lambda: cores)
    for start in (0, 9):
        got = [(*batch, torch.rand(3)) for batch in training_batches(photos, 8, 3, 17, start)]
        assert len(got) == 17 - start
        for (step, *tensors), (same_step, *same) in zip(got, expected[start:], strict=True):
            assert step == same_step
            assert all(map(torch.equal, tensors, same)), "images, labels, and what a layer would draw"


def test_a_splits_images_come_in_order(photos: ImageData) -> None:
    everything = photos.test.images(torch.arange(len(photos.test)))
    got = list(batches(photos.test, 5))
    assert [len(images) for images, _ in got] == [5, 5, 2]
    assert torch.equal(torch.cat([images for images, _ in got]), everything)
    assert torch.equal(torch.cat([labels for _, labels in got]), photos.test.labels)
    parts = [torch.tensor([3, 1]), torch.tensor([0])]
    for images, part in zip(images_of(photos.test, parts, 2), parts, strict=True):
        assert torch.equal(images, everything[part])


def test_one_core_less_decodes_while_the_main_thread_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "usable_cores", lambda: 4)

    def most(_: object) -> int:
        """The largest number of threads that are in `one` at a time."""
        lock, inside, largest = threading.Lock(), 0, 0

        def one(item: int) -> None:
            nonlocal inside, largest
            with lock:
                inside += 1
                largest = max(largest, inside)
            time.sleep(0.02)
            with lock:
                inside -= 1

        decoding.in_threads(one, range(24))
        return largest

    assert most(None) == 4
    assert list(ahead(most, [None])) == [3]
    monkeypatch.setattr(decoding, "usable_cores", lambda: 1)
    assert list(ahead(most, [None])) == [1]


def test_a_damaged_file_is_named_in_the_main_thread(photos: ImageData) -> None:
    order = torch.randperm(len(photos.train), generator=torch.Generator().manual_seed(0))
    index, split = order[17], photos.train  # it is in the third step
    while isinstance(split, SubSplit):
        index, split = split.indices[index], split.parent
    assert isinstance(split, decoding.ImageFiles)
    path = split.files[int(index)]
    path.write_bytes(path.read_bytes()[:200])
    steps = []
    with pytest.raises(BadInput, match=path.name) as caught:
        for step, _, _ in training_batches(photos, 8, 0, 3):
            steps.append(step)
    assert steps == [0, 1]
    assert "\n" not in str(caught.value)
    assert not at_work()


class Own:
    """A split of the user's."""

    labels = torch.zeros(4, dtype=torch.int64)

    def __len__(self) -> int:
        return 4

    def images(self, indices: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(indices), 3, 8, 8)


class Threaded(Own):
    threads: ClassVar[bool] = True


def test_what_is_made_ahead(photos: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    assert worthwhile(photos.train, 1)
    assert worthwhile(ResizedSplit(photos.train, (8, 8)), 1)
    assert not worthwhile(Own(), 10**9), "it may not be asked from several threads"
    assert worthwhile(Threaded(), 1)
    memory = ArraySplit(torch.zeros(4, 1, 16, 16, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64))
    many = LARGE // (3 * 16 * 16) + 1
    assert not worthwhile(memory, many), "a CPU that trains has no time left"
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: True)
    assert worthwhile(memory, many)
    assert worthwhile(SubSplit(memory, torch.arange(2)), many)
    assert not worthwhile(memory, many - 1)
    assert worthwhile(ResizedSplit(memory, (32, 32)), many // 4 + 1)


def test_augmentation_of_ones_own_may_draw_from_what_is_seeded(photos: ImageData) -> None:
    class Noisy(Classification):
        name: ClassVar[str] = "noisy"
        asked: ClassVar[set[str]] = set()

        def augment(
            self, images: torch.Tensor, labels: torch.Tensor, how: Augmentation, generator: torch.Generator
        ) -> tuple[torch.Tensor, torch.Tensor]:
            self.asked.add(threading.current_thread().name)
            return images + torch.rand(len(images), 1, 1, 1), labels

    before = dict(registered())
    register(Noisy)
    try:
        photos.task = "noisy"
        first, again = (list(training_batches(photos, 8, 0, 4)) for _ in range(2))
    finally:
        del registered()["noisy"]
    assert registered() == before
    assert all(torch.equal(a[1], b[1]) for a, b in zip(first, again, strict=True))
    assert Noisy.asked == {threading.main_thread().name}
    assert Noisy.augment is not Task.augment


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_fork_decodes_with_threads_of_its_own() -> None:
    assert decoding.in_threads(abs, range(8)) == list(range(8))
    child = os.fork()
    if not child:
        signal.alarm(SOON)
        os._exit(decoding.in_threads(abs, range(8)) != list(range(8)))
    assert os.waitpid(child, 0)[1] == 0


INTERRUPTED = """
import signal, sys
from passdeploy.data import folder
from passdeploy.feeding import training_batches
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start without one
folder.CACHE_BYTES = folder.CHECK_PIXELS = 0
for step, images, labels in training_batches(folder.load_folder(sys.argv[1]), 8, 0, 10**6):
    if step == 1:
        print("begun", flush=True)
"""


def test_an_interrupt_ends_it(tmp_path: Path) -> None:
    fill(tmp_path, {"red": 20, "green": 20}, suffix=".jpg")
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=SOON)
    assert process.returncode == -signal.SIGINT
    assert said.rstrip().endswith("KeyboardInterrupt")
