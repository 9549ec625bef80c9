"""Triton's Python backend over the runner of passdeploy; lies beside its bundle as `1/model.py`.

Needs numpy and the bundle's backend in Triton's Python, nothing else: the runner's source lies in `1/runner`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

OLDEST_PYTHON = (3, 11)
LARGEST_FAILURE = 500
"""Characters of an error that go back to a client."""


def _check_python() -> None:
    """What the runner's source is written for; else an import would fail that says nothing of why."""
    if sys.version_info < OLDEST_PYTHON:
        raise pb_utils.TritonModelException(
            f"passdeploy's runner needs Python {'.'.join(map(str, OLDEST_PYTHON))} or newer, and this Triton's is "
            f"{sys.version.split()[0]}; take a newer Triton, or ship with --kind onnxruntime"
        )


def _check_numpy() -> None:
    """Old Python backends hand over wrong numbers beside numpy 2, without a word: found out before serving."""
    probe = np.random.default_rng(0).random((3, 257), dtype=np.float32)
    # Through DLPack, so that the backend's own C++ view of the array is looked at.
    seen = pb_utils.Tensor.from_dlpack("probe", pb_utils.Tensor("probe", probe).to_dlpack()).as_numpy()
    if not np.array_equal(seen, probe):
        raise pb_utils.TritonModelException(
            f"this Triton's Python backend hands over wrong numbers beside numpy {np.__version__}; install 'numpy<2'"
        )


class TritonPythonModel:
    """One instance: a process of its own with a loaded bundle."""

    def initialize(self, args: dict[str, Any]) -> None:
        """Verifies and loads the bundle; what is wrong with it becomes the model's reason for not being ready."""
        _check_python()
        _check_numpy()
        config = json.loads(args["model_config"])
        here = Path(__file__).resolve().parent
        sys.path.insert(0, str(here / "runner"))
        from passdeploy.errors import PassdeployError
        from passdeploy.shipping.runner import load

        parameters = {key: value["string_value"] for key, value in config.get("parameters", {}).items()}
        self._input, self._output = config["input"][0]["name"], config["output"][0]["name"]
        self._known = PassdeployError
        key = here / parameters["verify_key"] if "verify_key" in parameters else None
        # Triton spreads instances over the GPUs, and each one's process sees them all.
        device = int(args["model_instance_device_id"]) if args["model_instance_kind"] == "GPU" else None
        try:
            self._model = load(here / "bundle", key=key, engine=parameters.get("engine"), device=device)
        except PassdeployError as error:
            raise pb_utils.TritonModelException(str(error)) from None

    def execute(self, requests: list[Any]) -> list[Any]:
        """Runs the images of all requests together; what fails is told to each of them."""
        arrays = [pb_utils.get_input_tensor_by_name(request, self._input).as_numpy() for request in requests]
        try:
            logits = self._model.run(arrays[0] if len(arrays) == 1 else np.concatenate(arrays))
        except Exception as error:
            told = str(error) if isinstance(error, self._known) else f"{type(error).__name__}: {error}"
            failure = pb_utils.TritonError(told[:LARGEST_FAILURE])
            return [pb_utils.InferenceResponse(output_tensors=[], error=failure) for _ in requests]
        responses, start = [], 0
        for array in arrays:
            part = np.ascontiguousarray(logits[start : start + len(array)])
            start += len(array)
            responses.append(pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor(self._output, part)]))
        return responses

    def finalize(self) -> None:
        """Waits for calls under way and frees the engine."""
        model = getattr(self, "_model", None)
        if model is not None:
            model.close()
