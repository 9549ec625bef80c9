"""An MLServer runtime over the runner of passdeploy; lies beside its bundle as `passdeploy_runtime.py`."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import numpy as np
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.errors import InferenceError, MLServerError
from mlserver.types import InferenceRequest, InferenceResponse

HERE = Path(__file__).resolve().parent
OLDEST_PYTHON = (3, 11)
SERVERS_ERROR = 500
"""HTTP: what MLServer's own InferenceError is not, which blames the request (400)."""


class PassdeployRuntime(MLModel):  # type: ignore[misc]
    """Serves a bundle over the V2 protocol."""

    async def load(self) -> bool:
        """Verifies and loads the bundle."""
        if sys.version_info < OLDEST_PYTHON:
            raise MLServerError(
                f"passdeploy's runner needs Python {'.'.join(map(str, OLDEST_PYTHON))} or newer, and MLServer runs on "
                f"{sys.version.split()[0]}",
                SERVERS_ERROR,
            )
        sys.path.insert(0, str(HERE / "runner"))
        from passdeploy.shipping.runner import load

        extra: dict[str, Any] = (self.settings.parameters.extra if self.settings.parameters else None) or {}
        key = HERE / extra["verify_key"] if "verify_key" in extra else None
        # Off the event loop: the models that are there go on answering while an engine is verified and compiled.
        self._model = await asyncio.to_thread(load, HERE / "bundle", key=key, engine=extra.get("engine"))
        self._output: str = self._model.contents.manifest["output"]["name"]
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Logits of the first input's images; what is wrong with these is the client's error, all else the server's."""
        from passdeploy.errors import BadInput

        try:
            images = np.asarray(NumpyCodec.decode_input(payload.inputs[0]))
            if np.issubdtype(images.dtype, np.floating):  # of whole numbers the runner scales uint8, and refuses others
                images = images.astype(np.float32, copy=False)
        except Exception as error:
            raise InferenceError(str(error)) from None
        try:
            # Off the event loop, which goes on taking requests meanwhile.
            logits = await asyncio.to_thread(self._model.run, images)
        except BadInput as error:
            raise InferenceError(str(error)) from None
        except Exception as error:
            raise MLServerError(f"{type(error).__name__}: {error}", SERVERS_ERROR) from None
        output = NumpyCodec.encode_output(self._output, logits)
        return InferenceResponse(id=payload.id, model_name=self.name, model_version=self.version, outputs=[output])

    async def unload(self) -> bool:
        """Waits for calls under way and frees the engine."""
        model = getattr(self, "_model", None)  # also called when load has failed
        if model is not None:
            await asyncio.to_thread(model.close)  # behind the calls that wait for a thread
        return True
