"""The structure: which units of every group are kept. What a search returns, and what surgery takes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from passdeploy.errors import BadInput

SCHEMA = "passdeploy.structure/1"


@dataclass(frozen=True)
class Structure:
    """One boolean per prunable unit of every group, in the groups' topological order; True = kept.

    A depth group has a single unit: its residual block.
    """

    masks: Mapping[str, tuple[bool, ...]]

    def widths(self) -> dict[str, int]:
        """Kept units per group."""
        return {name: sum(mask) for name, mask in self.masks.items()}

    def digest(self) -> str:
        """SHA-256 of the masks: the key under which a measurement is logged."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Kept unit indices and the full width, per group."""
        return {
            "schema": SCHEMA,
            "groups": {
                name: {"units": len(mask), "kept": [i for i, kept in enumerate(mask) if kept]}
                for name, mask in self.masks.items()
            },
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Structure:
        """Raises `BadInput` when it is not a structure of schema `passdeploy.structure/1`."""
        try:
            if data["schema"] != SCHEMA:
                raise BadInput(f"structure: schema is {data['schema']!r}, expected {SCHEMA!r}")
            masks = {}
            for name, entry in data["groups"].items():
                units, kept = int(entry["units"]), set(entry["kept"])
                if not kept <= set(range(units)):
                    raise BadInput(f"structure: group {name!r} keeps units outside 0..{units - 1}")
                masks[name] = tuple(i in kept for i in range(units))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise BadInput(f"structure: malformed ({type(error).__name__}: {error})") from None
        return cls(masks)

    @classmethod
    def load(cls, path: Path) -> Structure:
        try:
            return cls.from_json(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise BadInput(f"{path}: cannot be read as a structure ({error})") from None
