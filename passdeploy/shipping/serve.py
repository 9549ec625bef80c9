"""Serves a Triton repository on this machine and asks it: from a run to a served answer in two commands.

    passdeploy ship runs/demo --server triton --out runs/models
    python -m passdeploy.shipping.serve runs/models --once

Every model is asked for its bundle's sample images over HTTP, and the answers are compared with the expected outputs.
Without ``--once`` the server then goes on until it is interrupted.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from pathlib import Path

import numpy as np

from passdeploy.errors import BadInput, PassdeployError
from passdeploy.shipping.contents import Contents, open_bundle
from passdeploy.shipping.servers.process import Server, triton


def models_of(repository: Path) -> dict[str, Path]:
    """Model name -> its bundle, for the models of a repository that run bundles.

    Raises:
        BadInput: There is none.
    """
    found = {path.parent.parent.name: path for path in sorted(Path(repository).glob("*/1/bundle")) if path.is_dir()}
    if not found:
        raise BadInput(
            f"{repository}: no model with a bundle in it; passdeploy ship RUN --server triton --kind python writes one"
        )
    return found


def infer(server: Server, model: str, contents: Contents, images: np.ndarray) -> np.ndarray:
    """Asks over HTTP, with the V2 protocol's JSON; returns the logits.

    Raises:
        PassdeployError: The server's reason, in one line.
    """
    tensor = {"name": contents.manifest["input"]["name"], "shape": list(images.shape), "datatype": "FP32"}
    body = json.dumps({"inputs": [tensor | {"data": images.ravel().tolist()}]}).encode()
    status, answer = server.post(f"v2/models/{model}/infer", body)
    if status != 200:
        raise PassdeployError(f"serve: {model}: {' '.join(answer.split())[:300]}")
    (output,) = json.loads(answer)["outputs"]
    return np.array(output["data"], np.float32).reshape(output["shape"])


def ask(server: Server, model: str, contents: Contents) -> str:
    """Asks for every sample image; returns the line that tells the answers.

    Raises:
        PassdeployError: An answer is not what the bundle says it must be.
    """
    images, expected = contents.samples()
    answers = np.concatenate([infer(server, model, contents, image[None]) for image in images])
    difference = float(np.max(np.abs(answers - expected)) / max(float(np.max(np.abs(expected))), 1e-30))
    allowed = max(engine.tolerance for engine in contents.engines)
    if not difference <= allowed:
        raise PassdeployError(f"serve: {model}: answers differ from the bundle's samples by {difference:.1e}")
    chosen = answers.argmax(axis=1)
    names = [contents.classes[i] for i in (chosen if chosen.ndim == 1 else np.unique(chosen))]
    return f"{model}: {len(images)} sample images answered ({', '.join(names)}), difference {difference:.1e}"


def main(arguments: list[str] | None = None) -> int:
    """Exit 0: every model answered as its bundle says; 1: one did not; 2: bad input or no server here."""
    parser = argparse.ArgumentParser(prog="python -m passdeploy.shipping.serve", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("repository", type=Path)
    parser.add_argument("--once", action="store_true", help="stop after the samples were answered")
    parser.add_argument("--http-port", type=int, default=None, help="default: any free port")
    options = parser.parse_args(arguments)
    try:
        models = {name: open_bundle(path) for name, path in models_of(options.repository).items()}
        with tempfile.TemporaryDirectory(prefix="passdeploy-serve-") as folder:
            ports = () if options.http_port is None else tuple(options.http_port + i for i in range(3))
            with triton(options.repository, Path(folder, "log"), tuple(models), ports) as server:
                for name, contents in models.items():
                    print(ask(server, name, contents), flush=True)
                if not options.once:
                    print(f"serving on http://{server.http} and grpc://{server.grpc}; Ctrl-C ends it", flush=True)
                    return server.process.wait()
    except PassdeployError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    # Leaves by the way out, on which the server is ended and its folder removed, instead of at once.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
