"""Batches made before they are asked for: files are decoded while a network is trained or judged, not in turn with it.

Threads, not processes: what they do with an image is Pillow's and NumPy's, which let go of the interpreter's lock for
nine tenths of it, and they need neither shared memory, of which containers have little, nor a fork of a process
that has a GPU open.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import TypeVar

import torch
from torch import Tensor

from passdeploy.data.base import ArraySplit, ResizedSplit, Split, SubSplit

DEPTH = 2
"""Batches that are being made, or wait, besides the one that is being used: no more memory than theirs is taken."""
LARGE = 2**22
"""Values in a batch from which a GPU would wait for images that are in memory already."""

A = TypeVar("A")
B = TypeVar("B")


def ahead(make: Callable[[A], B], items: Iterable[A], depth: int = DEPTH) -> Generator[B]:
    """Yields `make(item)` for each item in order, while threads make the next ones.

    What `make` raises is raised here, in its place. However it ends, an iterator that is closed leaves no thread; one
    that is neither closed nor asked for more makes no more than `depth` results.

    Args:
        make: Called from several threads at once; must be a function of its item.
        items: Drawn from in the thread that iterates.
        depth: How many results may be there, or on their way, before they are asked for.
    """
    items, pool = iter(items), ThreadPoolExecutor(depth, "passdeploy-ahead")
    try:
        waiting: deque[Future[B]] = deque(pool.submit(make, item) for item in itertools.islice(items, depth))
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(pool.submit(make, item) for item in itertools.islice(items, 1))
            yield result
            del result  # else it is kept while the next one is waited for
    finally:
        pool.shutdown(cancel_futures=True)


def worthwhile(split: Split, batch: int) -> bool:
    """Whether a split's batches are to be made ahead.

    They are where files are decoded, and those of large images in memory where they are for a GPU; of a split of the
    user's own only where it says that it may be asked from several threads at once (`threads = True`).
    """
    inner = split
    while isinstance(inner, SubSplit | ResizedSplit):
        inner = inner.parent
    if isinstance(inner, ArraySplit):
        gpu = torch.cuda.is_available() and len(split) > 0
        return gpu and batch * split.images(torch.arange(1)).numel() >= LARGE
    return bool(getattr(inner, "threads", False))


def images_of(split: Split, parts: Iterable[Tensor], batch: int) -> Iterator[Tensor]:
    """Yields a split's images for each tensor of up to `batch` indices, in order; ahead where that is worthwhile."""
    if not worthwhile(split, batch):
        yield from map(split.images, parts)
        return
    with closing(ahead(lambda part: pinned(split.images(part)), parts)) as images:
        yield from images


def batches(split: Split, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the split in order as (images, labels); nothing of an empty one."""
    if not len(split):  # torch splits it into one part of no images
        return
    parts = torch.arange(len(split)).split(size)
    for part, images in zip(parts, images_of(split, parts, size), strict=True):
        yield images, split.labels[part]


def pinned(tensor: Tensor) -> Tensor:
    """The tensor in memory that a GPU copies from by itself, where there is a GPU."""
    return tensor.pin_memory() if torch.cuda.is_available() else tensor
