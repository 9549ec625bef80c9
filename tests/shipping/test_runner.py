from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from passdeploy.errors import BadInput
from passdeploy.shipping.bundle import write_bundle
from passdeploy.shipping.executors.base import Executor, in_batches
from passdeploy.shipping.runner import Model, load
from tests.shipping.conftest import CLASSES, SHAPE, make_source

Images = Callable[[int], np.ndarray]


def plain(bundle: Path, images: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(str(bundle / "model.onnx"), providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"images": image[None]})[0] for image in images])


def close(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and bool(np.max(np.abs(a - b), initial=0) <= 1e-5 * np.max(np.abs(b), initial=1))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_outputs_are_those_of_the_graph(sealed_bundle: Path, random_images: Images, count: int) -> None:
    images = random_images(count)
    with load(sealed_bundle) as model:
        assert model.classes == CLASSES
        assert close(model.run(images), plain(sealed_bundle, images))


def test_a_fixed_batch_takes_any_number(tmp_path: Path, random_images: Images) -> None:
    bundle = write_bundle(tmp_path / "bundle", make_source(tmp_path / "run", batch=4))
    single = write_bundle(tmp_path / "single", make_source(tmp_path / "run1"))
    images = random_images(11)
    with load(bundle) as model:
        for count in (0, 1, 3, 4, 5, 11):
            assert close(model.run(images[:count]), plain(single, images)[:count])


def test_uint8_pictures_are_taken_too(sealed_bundle: Path) -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (2, SHAPE[1], SHAPE[2], 3), dtype=np.uint8)
    images = (pixels.transpose(0, 3, 1, 2) / 255).astype(np.float32)
    with load(sealed_bundle) as model:
        assert close(model.run(pixels), model.run(images))


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((1, *SHAPE)),
        np.zeros(SHAPE, np.float32),
        np.zeros((1, 3, 9, 9), np.float32),
        np.zeros((1, *SHAPE), np.uint8),
    ],
)
def test_wrong_images_are_named(sealed_bundle: Path, images: np.ndarray) -> None:
    with load(sealed_bundle) as model, pytest.raises(BadInput, match="expected float32") as error:
        model.run(images)
    assert "\n" not in str(error.value)


def test_threads_share_a_model(sealed_bundle: Path, random_images: Images) -> None:
    images = random_images(40)
    expected = plain(sealed_bundle, images)
    with load(sealed_bundle) as model, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda i: model.run(images[i % 40 : i % 40 + 1]), range(400)))
    assert all(close(answer, expected[i % 40 : i % 40 + 1]) for i, answer in enumerate(answers))


class _Slow(Executor):
    """Holds a call until it is let go, and notes in what order things happen."""

    def __init__(self) -> None:
        self.entered, self.go = threading.Event(), threading.Event()
        self.events: list[str] = []

    def run(self, images: np.ndarray) -> np.ndarray:
        self.entered.set()
        assert self.go.wait(10)
        self.events.append("ran")
        return np.zeros((len(images), len(CLASSES)), np.float32)

    def close(self) -> None:
        self.events.append("closed")


def test_closing_waits_for_calls_under_way(sealed_bundle: Path, random_images: Images) -> None:
    loaded = load(sealed_bundle)
    slow = _Slow()
    model = Model(loaded.contents, loaded.engine, slow)
    caller = threading.Thread(target=model.run, args=(random_images(1),))
    caller.start()
    assert slow.entered.wait(10)
    closer = threading.Thread(target=model.close)
    closer.start()
    closer.join(0.05)
    assert closer.is_alive()
    with pytest.raises(BadInput, match="closed"):
        model.run(random_images(1))
    slow.go.set()
    caller.join(10)
    closer.join(10)
    model.close()
    loaded.close()
    assert slow.events == ["ran", "closed"]


def test_bind_and_call_are_for_measurements(sealed_bundle: Path, random_images: Images) -> None:
    with load(sealed_bundle) as model:
        model.bind(random_images(1))
        model.call()
        with pytest.raises(BadInput, match="exactly 1"):
            model.bind(random_images(2))
    with pytest.raises(BadInput, match="closed"):
        model.call()


def test_an_option_of_another_backend_is_refused_by_name(sealed_bundle: Path) -> None:
    with pytest.raises(BadInput, match="cuda_graphs=: onnxruntime has no such option; it takes threads"):
        load(sealed_bundle, cuda_graphs=True)


@pytest.mark.parametrize("threads", [0, -1, 1.5, "2"])
def test_a_number_of_threads_that_is_none_is_refused(sealed_bundle: Path, threads: object) -> None:
    with pytest.raises(BadInput, match=r"^threads=.*: must be a whole number, 1 or more$"):
        load(sealed_bundle, threads=threads)


def test_in_batches_fills_up_and_cuts_off() -> None:
    seen: list[int] = []

    def double(part: np.ndarray) -> np.ndarray:
        seen.append(len(part))
        return part * 2

    values = np.arange(7, dtype=np.float32)[:, None]
    assert np.array_equal(in_batches(double, values, 3), values * 2)
    assert seen == [3, 3, 3]


_PROGRAM = """
import sys
import numpy, onnxruntime
before = set(sys.modules)
from passdeploy.shipping.runner import load
import numpy as np
with load(sys.argv[1]) as model:
    model.run(np.zeros((2, 3, 12, 10), np.float32))
heavy = {"torch", "torchvision", "pandas", "pydantic", "onnx", "yaml", "typer", "rich", "jinja2", "safetensors"}
found = sorted(heavy & set(sys.modules))
print("modules:", found, len(set(sys.modules) - before))
"""


def test_a_process_of_its_own_imports_nothing_heavy(sealed_bundle: Path) -> None:
    done = subprocess.run([sys.executable, "-c", _PROGRAM, str(sealed_bundle)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("modules: [] "), done.stdout
