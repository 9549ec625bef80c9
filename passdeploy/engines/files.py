"""Engine files: one file with the engine, ``engine.json`` with its facts and digest beside it.

An engine is native code or is turned into it, so its bytes are compared with the recorded digest before any library
sees them. That detects damage and mix-ups; tampering is what a bundle's signature is for.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from passdeploy.engines.base import Engine
from passdeploy.errors import BadInput
from passdeploy.workspace import write_atomic

SCHEMA = "passdeploy.engine/1"
FACTS = "engine.json"


def save_engine(engine: Engine, folder: Path) -> Path:
    """Writes ``engine<suffix>`` and ``engine.json`` into `folder`, made when absent; returns the engine's path.

    The engine goes first, so that an ``engine.json`` always describes a file that is there in full.

    Raises:
        NotWritten: The disk takes it not.
    """
    path = folder / f"engine{engine.suffix}"
    write_atomic(path, engine.data)
    facts = {
        "schema": SCHEMA,
        "backend": engine.backend,
        "file": path.name,
        "bytes": len(engine.data),
        "sha256": hashlib.sha256(engine.data).hexdigest(),
        "meta": dict(engine.meta),
    }
    write_atomic(folder / FACTS, json.dumps(facts, indent=2, sort_keys=True) + "\n")
    return path


def _facts(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(
            f"{path}: not there, so the engine beside it cannot be checked; compile it again with passdeploy compile"
        ) from None
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: cannot be read ({error}); compile the engine again") from None
    wanted = {"schema": str, "backend": str, "file": str, "bytes": int, "sha256": str, "meta": dict}
    if not isinstance(facts, dict) or facts.get("schema") != SCHEMA:
        raise BadInput(f"{path}: not an engine description of schema {SCHEMA!r}; compile the engine again")
    for key, kind in wanted.items():
        if not isinstance(facts.get(key), kind):
            raise BadInput(f"{path}: {key!r} is missing or malformed; compile the engine again")
    if Path(facts["file"]).name != facts["file"]:
        raise BadInput(f"{path}: 'file' must name a file in the same folder, not {facts['file']!r}")
    return facts


def load_engine(path: Path) -> Engine:
    """Reads an engine back and checks its bytes against the recorded size and SHA-256.

    Args:
        path: The engine file, its ``engine.json``, or their folder.

    Raises:
        BadInput: Missing, truncated or changed; nothing of the engine was deserialised.
    """
    folder = path if path.is_dir() else path.parent
    facts = _facts(folder / FACTS)
    file = folder / facts["file"]
    if path not in (folder, folder / FACTS, file):
        raise BadInput(f"{path}: {folder / FACTS} describes {facts['file']}, not this file")
    try:
        data = file.read_bytes()
    except OSError as error:
        raise BadInput(f"{file}: the engine cannot be read ({error.strerror or error})") from None
    if len(data) != facts["bytes"]:
        raise BadInput(
            f"{file}: has {len(data)} bytes, {FACTS} says {facts['bytes']}: truncated or replaced; "
            "copy it again or compile it again"
        )
    if hashlib.sha256(data).hexdigest() != facts["sha256"]:
        raise BadInput(f"{file}: SHA-256 differs from {FACTS}: changed after it was compiled; copy or compile it again")
    return Engine(backend=facts["backend"], data=data, suffix=file.suffix, meta=facts["meta"])
