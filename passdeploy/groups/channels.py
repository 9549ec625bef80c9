"""Channel units from Torch-Pruning's dependency graph (DepGraph, arXiv 2301.12900).

DepGraph says which module's channels depend on which other's, with an index map on every edge. Here every channel of
every node is an atom, every mapped pair of channels is united, and what is connected is a unit. Grouped convolutions
and group norms unite the channels of one of their groups, because only whole ones can be removed.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from passdeploy.groups.attention import head_count
from passdeploy.groups.depgraph import WithInput, chunks, dependency_graph
from passdeploy.groups.frozen import frozen_channels
from passdeploy.groups.resized import halves
from passdeploy.groups.types import Side

CONV = (nn.modules.conv._ConvNd,)
PRODUCERS = (nn.modules.conv._ConvNd, nn.Linear)
NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm)
_CLOSED = {
    nn.LayerNorm: "layer norm over its channels",
    nn.MultiheadAttention: "attention",
    nn.Embedding: "embedding",
    nn.LSTM: "recurrent layer",
}

_LOST = "its channels could not be followed through the graph"


@dataclass
class Unit:
    """Channels that can only be removed together.

    Attributes:
        channels: Per (module, side), the channels.
        reason: Why it can't be removed; empty when it can.
    """

    channels: dict[tuple[str, Side], list[int]] = field(default_factory=lambda: defaultdict(list))
    reason: str = ""


class UnionFind:
    """Disjoint sets over 0 .. size - 1 and the integers that `new` hands out; a set is called by its least member."""

    def __init__(self, size: int = 0) -> None:
        self.parent = list(range(size))

    def new(self) -> int:
        self.parent.append(len(self.parent))
        return len(self.parent) - 1

    def find(self, item: int) -> int:
        while self.parent[item] != item:
            self.parent[item] = self.parent[self.parent[item]]
            item = self.parent[item]
        return item

    def unite(self, a: int, b: int) -> None:
        a, b = self.find(a), self.find(b)
        if a != b:
            self.parent[max(a, b)] = min(a, b)


def is_passing(module: nn.Module) -> bool:
    """Whether a module's input and output channels go together: norms, PReLU, depthwise and grouped convolutions."""
    if isinstance(module, CONV):
        return module.groups > 1
    return isinstance(module, (*NORMS, nn.PReLU))


class _Walk:
    """Unites the atoms of a dependency graph."""

    def __init__(self, graph: Any) -> None:
        self.graph = graph
        self.sets = UnionFind()
        self.nodes = list(graph.module2node.values())
        self.ids: dict[tuple[int, Side], dict[int, int]] = defaultdict(dict)
        self.index = {id(node): i for i, node in enumerate(self.nodes)}
        self.queue: deque[tuple[Any, Side, list[int]]] = deque()
        self.lost: set[int] = set()
        # an index map that DepGraph got wrong can multiply channels without end
        self.limit = max(max(channel_counts(n.module)) for n in self.nodes if isinstance(n.module, PRODUCERS))
        self.limit = max(self.limit, *((halves(n) or (0, 0))[1] for n in self.nodes))

    def atom(self, node: Any, side: Side, channel: int) -> tuple[int, bool]:
        known = self.ids[(self.index[id(node)], side)]
        if channel in known:
            return known[channel], False
        known[channel] = self.sets.new()
        return known[channel], True

    def side(self, node: Any, function: Callable[..., Any]) -> Side:
        pruner = self.graph.get_pruner_of_module(node.module)
        return "out" if function == pruner.prune_out_channels else "in"

    def run(self) -> None:
        """Starts from all convolutions and linear layers and follows every edge until nothing new is reached."""
        for node in self.nodes:
            if isinstance(node.module, PRODUCERS):
                inside, outside = channel_counts(node.module)
                self._seed(node, "out", range(outside))
                if not self._joined(node):
                    self._seed(node, "in", range(inside))
        while self.queue:
            self._spread(*self.queue.popleft())
        for node in self.nodes:
            self._unite_conv_groups(node)
            self._unite_norm_groups(node)
            self._unite_chunks(node)

    def _joined(self, node: Any) -> bool:
        pruner = self.graph.get_pruner_of_module(node.module)
        return bool(pruner.prune_in_channels == pruner.prune_out_channels)

    def _seed(self, node: Any, side: Side, channels: Iterable[int]) -> None:
        new = [channel for channel in channels if self.atom(node, side, channel)[1]]
        if new:
            self.queue.append((node, side, new))

    def _spread(self, node: Any, side: Side, channels: list[int]) -> None:
        from torch_pruning._helpers import _HybridIndex

        for edge in node.dependencies:
            if self.side(node, edge.trigger) != side:
                continue
            target_side = self.side(edge.target, edge.handler)
            indices = [_HybridIndex(idx=channel, root_idx=channel) for channel in channels]
            for mapping in edge.index_mapping:
                if mapping is not None:
                    indices = mapping(indices)
            fresh = []
            for index in indices:
                if index.root_idx is None:
                    continue
                if not 0 <= index.idx < self.limit:
                    self.lost.add(self.atom(node, side, index.root_idx)[0])
                    continue
                atom, is_new = self.atom(edge.target, target_side, index.idx)
                self.sets.unite(self.atom(node, side, index.root_idx)[0], atom)
                if is_new:
                    fresh.append(index.idx)
            if fresh:
                self.queue.append((edge.target, target_side, fresh))

    def _unite_conv_groups(self, node: Any) -> None:
        module = node.module
        if not isinstance(module, CONV) or module.groups == 1 or self._joined(node):
            return
        inside, outside = channel_counts(module)
        for group in range(module.groups):
            first = self.atom(node, "out", group * (outside // module.groups))[0]
            for side, count in (("out", outside // module.groups), ("in", inside // module.groups)):
                for channel in range(group * count, (group + 1) * count):
                    self.sets.unite(first, self.atom(node, side, channel)[0])  # type: ignore[arg-type]

    def _unite_norm_groups(self, node: Any) -> None:
        if isinstance(node.module, nn.GroupNorm):
            each = node.module.num_channels // node.module.num_groups
            for channel in range(node.module.num_channels):
                first = self.atom(node, "out", channel - channel % each)[0]
                self.sets.unite(first, self.atom(node, "out", channel)[0])

    def _unite_chunks(self, node: Any) -> None:
        """Equal parts of a split, or of a gate, must stay equal: a channel goes with those at its place in the others.

        A network computes where it splits from the channels it is given, so parts of different sizes would be cut at
        the wrong place.
        """
        found = chunks(node) or halves(node)
        if found is None:
            return
        each, whole = found
        source = node.inputs[0] if type(node.module).__name__ == "_SliceOp" else node
        known = self.ids[(self.index[id(source)], "out")]
        for channel in range(whole):
            if channel in known and channel % each in known:
                self.sets.unite(known[channel], known[channel % each])


def channel_counts(module: nn.Module) -> tuple[int, int]:
    """Input and output channels of a convolution or linear layer."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    assert isinstance(module, CONV)
    return module.in_channels, module.out_channels


def side_size(module: nn.Module, side: Side) -> int | None:
    """Channels of a member's side; None when the module has no channels of its own there."""
    if isinstance(module, PRODUCERS):
        return channel_counts(module)[0 if side == "in" else 1]
    if isinstance(module, nn.GroupNorm):
        return module.num_channels
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return module.num_features
    if isinstance(module, nn.PReLU):
        return module.num_parameters if module.num_parameters > 1 else None
    return (frozen_channels(module) or head_count(module)) if side == "out" else None


def _closed(node: Any, names: dict[Any, str]) -> str:
    """Why channels that reach a node must stay; empty when they need not."""
    module = node.module
    if type(module).__name__ == "_OutputOp":
        return "its channels are the network's outputs"
    if isinstance(module, nn.Parameter):
        return "its channels meet a plain parameter"
    if names.get(module) == "input":
        return "its channels are tied to the network's input"
    for kind, reason in _CLOSED.items():
        if isinstance(module, kind):
            return f"its channels meet {names.get(module, 'a')[len('network.') :]}: {reason}"
    return ""


def channel_units(network: nn.Module, example: Tensor) -> list[Unit]:
    """Finds all units of a network, those that can't be removed included (with the reason).

    Args:
        network: In eval mode, with parameters that require gradients; it is traced, not changed.
        example: An input.
    """
    model = WithInput(network, example)
    graph, broken = dependency_graph(model, example)
    names = {module: name for name, module in model.named_modules()}
    walk = _Walk(graph)
    walk.run()
    units: dict[int, Unit] = defaultdict(Unit)
    for (number, side), atoms in walk.ids.items():
        node = walk.nodes[number]
        reason = _LOST if id(node) in broken else _closed(node, names)
        name = names.get(node.module, "") if isinstance(node.module, nn.Module) else ""
        size = side_size(node.module, side) if name.startswith("network.") or name == "network" else None
        passing = size is not None and is_passing(node.module)
        for channel, atom in atoms.items():
            unit = units[walk.sets.find(atom)]
            if reason or atom in walk.lost:
                unit.reason = unit.reason or reason or _LOST
            if size is None or (passing and side == "in"):
                continue  # the kept inputs of a grouped convolution follow from its kept outputs
            if channel >= size:
                unit.reason = unit.reason or _LOST
                continue
            unit.channels[(name[len("network.") :], side)].append(channel)
    return [unit for unit in units.values() if unit.channels]
