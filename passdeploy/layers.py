"""Where the time of an engine goes: what its runtime's profiler says of the layers, by module and side by side.

Exported nodes are named after their modules (`passdeploy.onnx_graph.name_after_modules`), and runtimes name what they
fuse after its nodes, so that layers of engines of one network can be told to belong together, whoever runs them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

MOST_ROWS = 24
FEWEST_BLOCKS = 4
"""Networks with fewer blocks than this (VGG's one long sequence) are shown module by module."""
OTHER = "the runtime's own"
"""Layers that belong to no module: what a runtime adds to change layouts or types."""
_NAME = re.compile(r"((?:\w+\.)*\w+)/[A-Z]\w*")


@dataclass(frozen=True)
class LayerTimes:
    """What one part of a network costs in several engines.

    Attributes:
        name: Path of the module, or of the block that several are summed up in.
        ms: Milliseconds in each engine; 0 where it has no such layer.
    """

    name: str
    ms: tuple[float, ...]


def module_of(layer: str) -> str | None:
    """The module that a runtime's layer is named after; None: after none.

    ``network.layer1.0.conv1/Conv + network.layer1.0.relu/Relu`` -> ``layer1.0.conv1``.
    """
    found = _NAME.search(layer)
    return None if found is None else found[1].removeprefix("network.")


def by_block(engines: Sequence[Mapping[str, float]]) -> list[LayerTimes]:
    """Sums up the layers of engines of the same network over their blocks, in the order of the first engine.

    Args:
        engines: Milliseconds per layer, by the runtime's names, in order.
    """
    modules = list(dict.fromkeys(module_of(layer) for engine in engines for layer in engine))
    named = [module for module in modules if module is not None]
    blocks = {module: module.rpartition(".")[0] or module for module in named}
    if len(set(blocks.values())) < FEWEST_BLOCKS:
        blocks = {module: module for module in named}
    depth = max((block.count(".") for block in blocks.values()), default=0)
    while len(set(blocks.values())) > MOST_ROWS and depth > 0:
        blocks = {module: ".".join(block.split(".")[:depth]) for module, block in blocks.items()}
        depth -= 1
    sums: dict[str, list[float]] = {}
    for index, engine in enumerate(engines):
        for layer, ms in engine.items():
            module = module_of(layer)
            row = sums.setdefault(OTHER if module is None else blocks[module], [0.0] * len(engines))
            row[index] += ms
    last = sums.pop(OTHER, None)
    rows = [LayerTimes(name, tuple(ms)) for name, ms in sums.items()]
    return rows if last is None else [*rows, LayerTimes(OTHER, tuple(last))]
