"""What CONTRIBUTING.md says of the code's layout holds."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "passdeploy"
MODULES = sorted(PACKAGE.rglob("*.py"))
# (folder, what nothing in it may import)
DIRECTIONS = [
    ("engines", ("search", "stages", "pipeline", "cli", "reporting", "shipping.bundle")),
    ("latency", ("search", "stages", "pipeline", "cli", "reporting")),
    ("groups", ("search", "stages", "pipeline", "cli", "latency", "engines", "reporting")),
    ("models", ("search", "stages", "pipeline", "cli", "latency", "engines", "reporting")),
    ("data", ("search", "stages", "pipeline", "cli", "latency", "engines", "reporting")),
    ("search", ("engines", "stages", "pipeline", "cli", "reporting")),
    ("stages", ("pipeline", "cli")),
    ("reporting", ("search", "stages", "pipeline", "cli", "engines")),
]


def imported(path: Path) -> Iterator[str]:
    """Modules of this package that a file imports when it is run: what only type checkers see is left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    unseen = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in unseen:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_a_file_can_be_read_in_one_sitting() -> None:
    long = {str(path): count for path in MODULES if (count := len(path.read_text("utf-8").splitlines())) >= 350}
    assert not long


@pytest.mark.parametrize(("folder", "above"), DIRECTIONS, ids=[folder for folder, _ in DIRECTIONS])
def test_imports_point_one_way(folder: str, above: tuple[str, ...]) -> None:
    paths = sorted((PACKAGE / folder).rglob("*.py"))
    assert paths
    forbidden = tuple(f"passdeploy.{name}." for name in above)
    found = [
        f"{path.relative_to(PACKAGE)}: {name}"
        for path in paths
        for name in imported(path)
        if f"{name}.".startswith(forbidden)
    ]
    assert not found
