"""Reads a YAML configuration file: plain values, each key once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from passdeploy.errors import BadInput


class _Loader(yaml.SafeLoader):
    """Refuses a key that is there twice: one of the two would be lost without a word."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in lines:
                    raise yaml.YAMLError(
                        f"line {key.start_mark.line + 1} gives {key.value!r} again, after line {lines[key.value]}"
                    )
                lines[key.value] = key.start_mark.line + 1
        return node


def load_file(path: Path) -> dict[str, Any]:
    """Reads a YAML configuration file as nested dictionaries.

    Raises:
        BadInput: Missing, unreadable, not YAML, not a mapping, or with a key that is there twice.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except UnicodeDecodeError:
        raise BadInput(f"--config {path}: is not text in UTF-8; save it as that") from None
    except OSError as error:
        raise BadInput(f"--config {path}: cannot be read ({error.strerror}); check the path") from None
    except (yaml.YAMLError, ValueError) as error:  # the latter of what looks like a date and is none
        line = str(error).replace("\n", " ")
        raise BadInput(f"--config {path}: is not valid YAML ({line})") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise BadInput(f"--config {path}: must be a mapping of keys to values, is a {type(values).__name__}")
    return values
