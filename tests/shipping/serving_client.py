"""The client's side of a served bundle; runs in the serving environment (tritonclient, numpy 1, no torch).

serving_client.py infer http|grpc URL MODEL IN.npy OUT.npy
serving_client.py swap HTTP_URL GRPC_URL REPOSITORY MODEL BUNDLE_A BUNDLE_B REQUESTS SWAPS CONCURRENCY
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

SHARED_IMAGES = 64


class Client:
    """One connection; not to be shared between threads."""

    def __init__(self, protocol: str, url: str, model: str) -> None:
        if protocol == "http":
            import tritonclient.http as library
        else:
            import tritonclient.grpc as library
        self._library: Any = library
        self._client: Any = library.InferenceServerClient(url)
        self._model = model

    def infer(self, images: np.ndarray) -> np.ndarray:
        sent = self._library.InferInput("images", list(images.shape), "FP32")
        sent.set_data_from_numpy(images)
        logits: np.ndarray = self._client.infer(self._model, [sent]).as_numpy("logits")
        return logits

    def config_batch(self) -> int:
        """The largest batch that the model takes."""
        config = self._client.get_model_config(self._model)
        return int(config["max_batch_size"] if isinstance(config, dict) else config.config.max_batch_size)

    def load(self) -> None:
        self._client.load_model(self._model)


def infer(protocol: str, url: str, model: str, source: str, target: str) -> None:
    """Sends images in requests of growing size."""
    client = Client(protocol, url, model)
    images, parts, start, size = np.load(source), [], 0, 1
    largest = client.config_batch()
    while start < len(images):
        parts.append(client.infer(images[start : start + size]))
        start, size = start + size, min(size + 1, largest)
    np.save(target, np.concatenate(parts))


class Load:
    """Threads that send requests until enough were sent and `finished` is set, and compare every answer."""

    def __init__(self, url: str, model: str, images: np.ndarray, expected: list[np.ndarray], requests: int) -> None:
        self.url, self.model, self.images, self.expected = url, model, images, expected
        self.left = requests
        self.finished = threading.Event()
        self.lock = threading.Lock()
        self.serving = {0}
        """Which bundles an answer may come from at the moment."""
        self.answered = [0] * len(expected)
        self.problems: list[str] = []
        self.seconds: list[float] = []

    def work(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        client = Client("grpc", self.url, self.model)
        while True:
            with self.lock:
                if (self.left <= 0 and self.finished.is_set()) or len(self.problems) > 20:
                    return
                self.left -= 1
                before = set(self.serving)
            index = int(rng.integers(len(self.images)))
            begun = time.perf_counter()
            try:
                answer = client.infer(self.images[index : index + 1])[0]
            except Exception as error:
                with self.lock:
                    self.problems.append(f"lost: {type(error).__name__}: {error}")
                continue
            taken = time.perf_counter() - begun
            with self.lock:
                self.seconds.append(taken)
                # Whatever served when it was sent or when it came back is right.
                self._judge(answer, index, before | self.serving)

    def _judge(self, answer: np.ndarray, index: int, allowed: set[int]) -> None:
        for number in allowed:
            wanted = self.expected[number][index]
            if np.max(np.abs(answer - wanted)) <= 1e-5 * np.max(np.abs(wanted)):
                self.answered[number] += 1
                return
        self.problems.append(f"wrong answer for image {index}")


def swap(
    http: str, grpc: str, repository: str, model: str, a: str, b: str, requests: str, swaps: str, concurrency: str
) -> None:
    """Swaps two bundles under load; prints what happened as JSON."""
    from passdeploy.shipping.repository import write_repository
    from passdeploy.shipping.runner import load

    bundles, times, bare = (a, b), int(swaps), []
    images, expected = None, []
    for bundle in bundles:
        with load(bundle) as runner:
            if images is None:
                shape = (SHARED_IMAGES, *runner.contents.input_shape)
                images = np.random.default_rng(0).random(shape, dtype=np.float32)
            expected.append(np.concatenate([runner.run(image[None]) for image in images]))
            for image in images:
                begun = time.perf_counter()
                runner.run(image[None])
                bare.append(time.perf_counter() - begun)
    assert images is not None
    alone = Load(grpc, model, images, expected, min(500, int(requests)))
    alone.finished.set()
    alone.work(0)
    total = int(requests)
    job = Load(grpc, model, images, expected, total)
    threads = [threading.Thread(target=job.work, args=(seed,)) for seed in range(int(concurrency))]
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    done = 0
    try:
        control = Client("http", http, model)
        for number in range(1, times + 1):
            # Spread over the requests, so that every swap happens under load.
            while job.left > total * (times + 1 - number) / (times + 1) and len(job.problems) <= 20:
                time.sleep(0.002)
            new = number % 2
            write_repository(Path(repository), Path(bundles[new]), "triton", name=model)
            with job.lock:
                job.serving = {0, 1}
            control.load()
            with job.lock:
                job.serving = {new}
            done += 1
    finally:
        job.finished.set()
    for thread in threads:
        thread.join()
    wall = time.perf_counter() - begun
    milliseconds = np.array(job.seconds) * 1e3
    quick = 1e3 * float(np.median(alone.seconds))
    print(
        json.dumps(
            {
                "requests": len(job.seconds),
                "swaps": done,
                "answered_by": job.answered,
                "problems": (alone.problems + job.problems)[:20],
                "wall_s": round(wall, 2),
                "p50_ms": round(float(np.percentile(milliseconds, 50)), 3),
                "p99_ms": round(float(np.percentile(milliseconds, 99)), 3),
                "one_at_a_time_p50_ms": round(quick, 3),
                "bare_engine_p50_ms": round(1e3 * float(np.median(bare)), 3),
                "overhead_p50_ms": round(quick - 1e3 * float(np.median(bare)), 3),
            }
        )
    )


if __name__ == "__main__":
    {"infer": infer, "swap": swap}[sys.argv[1]](*sys.argv[2:])
