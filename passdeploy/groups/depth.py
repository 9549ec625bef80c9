"""Depth units: residual branches that can be skipped, found in the traced graph.

A residual branch ends in an addition of which one input is the branch's source unchanged. Everything between the source
and the addition must be used by the branch alone.
"""

from __future__ import annotations

import inspect
import operator
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from passdeploy.groups.attention import describe
from passdeploy.groups.channels import NORMS
from passdeploy.groups.check import first_line

_ADDS = {operator.add, operator.iadd, torch.add}
_MULTIPLIES = {operator.mul, operator.imul, torch.mul}
_KEEPS_ZERO_MODULES = (
    nn.Dropout, nn.Dropout2d, nn.Identity, nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish, nn.Tanh, nn.LeakyReLU,
    nn.ELU, nn.Mish, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Flatten,
)  # fmt: skip
_KEEPS_ZERO_FUNCTIONS = {
    "relu", "relu_", "dropout", "stochastic_depth", "drop_path", "silu", "gelu", "hardswish", "tanh", "permute",
    "transpose", "reshape", "view", "flatten", "contiguous", "clone", "neg", "getitem", "leaky_relu",
}  # fmt: skip
_GATES = (
    nn.modules.conv._ConvNd,
    nn.Linear,
    nn.modules.batchnorm._BatchNorm,
    nn.LayerNorm,
    nn.GroupNorm,
)


@dataclass(frozen=True)
class Branch:
    """A residual branch.

    Attributes:
        name: The innermost module that contains it; where it contains several, the part of it that ends the branch.
        modules: Its modules with parameters or buffers, and norms without, in execution order.
        gate: The module whose zero output makes the branch zero.
        starts: Modules fed by the source.
    """

    name: str
    modules: tuple[str, ...]
    gate: str
    starts: tuple[str, ...]


class _Tracer(fx.Tracer):
    """Leaves attentions and what it is told whole, as it does modules of `torch.nn`; knows where it is."""

    def __init__(self, opaque: Collection[str]) -> None:
        super().__init__(autowrap_functions=())
        self.opaque, self.inside = opaque, [""]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name in self.opaque or describe(m) is not None:
            return True
        # a library's own convolutions and norms (padding that depends on the size, an activation inside) stay whole too
        return isinstance(m, _GATES) or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self.inside.append(self.path_of_module(m))
        result = super().call_module(m, forward, args, kwargs)
        self.inside.pop()  # an error leaves the module it came from on top
        return result


def trace(model: nn.Module) -> tuple[fx.Graph, dict[str, str]]:
    """Traces a network symbolically; modules of `torch.nn`, attentions and what can't be traced stay whole.

    Returns:
        The graph, and the modules whose own code can't be traced, with the reason.

    Raises whatever the code of the network's outermost module raises: then nothing can be told apart.
    """
    opaque: dict[str, str] = {}
    further = list(inspect.signature(model.forward).parameters.values())[1:]
    options = {p.name: p.default for p in further if p.default is not p.empty}  # they are what they are, not inputs
    while True:
        tracer = _Tracer(opaque)
        try:
            return tracer.trace(model, options or None), opaque
        except Exception as error:
            where = tracer.inside[-1]
            if not where or where in opaque:
                raise
            opaque[where] = first_line(error).split(". ")[0]


def _is_add(node: fx.Node) -> bool:
    if node.op == "call_function":
        return node.target in _ADDS and "alpha" not in node.kwargs
    return node.op == "call_method" and node.target in ("add", "add_") and "alpha" not in node.kwargs


def _counts(module: nn.Module) -> bool:
    """Whether a module can't stand for itself where its branch is gone: its state, or a norm's number of channels."""
    stateful = any(True for _ in module.parameters()) or any(True for _ in module.buffers())
    return stateful or isinstance(module, NORMS)


def _between(result: fx.Node, source: fx.Node) -> set[fx.Node] | None:
    """The nodes from `source` (excluded) to `result`; None when the result depends on anything else."""
    seen: set[fx.Node] = set()
    stack = [result]
    while stack:
        node = stack.pop()
        if node is source or node in seen:
            continue
        if node.op == "placeholder":
            return None
        seen.add(node)
        stack.extend(node.all_input_nodes)
    return seen


def _drop_unread(graph: fx.Graph) -> None:
    """Erases what nobody reads: shapes that only assertions look at, attention weights that are thrown away."""
    for node in reversed(list(graph.nodes)):
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if node.op == "call_function":
            in_place = name.endswith("_") or name in ("setitem", "iadd", "imul", "isub", "itruediv")
            unread = not in_place
        else:
            unread = node.op == "get_attr" or (node.op == "call_method" and name in ("dim", "size"))
        if unread and not node.users:
            graph.erase_node(node)


class _Finder:
    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules())
        self.graph, self.opaque = trace(model)
        _drop_unread(self.graph)
        self.order = {node: i for i, node in enumerate(self.graph.nodes)}
        self.calls: dict[str, list[fx.Node]] = {}
        for node in self.graph.nodes:
            if node.op == "call_module":
                self.calls.setdefault(str(node.target), []).append(node)

    def module(self, node: fx.Node) -> nn.Module | None:
        return self.modules[str(node.target)] if node.op == "call_module" else None

    def passed(self, node: Any) -> Any:
        """What a node is in evaluation: nothing happens to it in an identity or a dropout."""
        while isinstance(node, fx.Node) and type(self.module(node)) in (nn.Identity, nn.Dropout) and node.args:
            node = node.args[0]
        return node

    def gate(self, node: Any, inside: set[fx.Node]) -> str | None:
        """The module whose zero output makes `node` zero; None when there is none."""
        if not isinstance(node, fx.Node) or node not in inside:
            return None
        module = self.module(node)
        if isinstance(module, _GATES):
            return str(node.target) if module.weight is not None else None
        spec = None if module is None else describe(module)
        if spec is not None:
            return str(node.target) if spec.proj else None
        if module is not None:
            keeps = isinstance(module, _KEEPS_ZERO_MODULES) or type(module).__name__ in ("StochasticDepth", "DropPath")
            return self.gate(node.args[0], inside) if keeps and node.args else None
        if node.target in _MULTIPLIES or node.target in ("mul", "mul_"):
            return next((g for g in (self.gate(a, inside) for a in node.args[:2]) if g is not None), None)
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if name in _KEEPS_ZERO_FUNCTIONS and node.args:
            return self.gate(node.args[0], inside)
        return None

    def branch(self, add: fx.Node, result: fx.Node, source: fx.Node) -> Branch | None:
        """The branch from `source` to `result`, if it is one that can go."""
        if self.order[source] > self.order[result]:
            return None
        inside = _between(result, source)
        if not inside or any(user not in inside and user is not add for node in inside for user in node.users):
            return None
        gate = self.gate(result, inside)
        if gate is None:
            return None
        own = []
        for node in sorted(inside, key=self.order.__getitem__):
            if node.op != "call_module":
                continue
            name = str(node.target)
            if not _counts(self.modules[name]):
                continue
            if any(call not in inside for call in self.calls[name]):
                return None
            if name not in own:
                # surgery takes the children first: a removed parent has none
                below = [n for n, m in self.modules[name].named_modules(prefix=name) if _counts(m)]
                own += sorted(below, key=lambda n: -n.count("."))
        starts = tuple(n for n in own if any(source in call.all_input_nodes for call in self.calls.get(n, ())))
        return Branch(_common_prefix(own), tuple(own), gate, starts)

    def __iter__(self) -> Iterator[Branch]:
        for node in self.graph.nodes:
            if not _is_add(node) or len(node.args) != 2 or not all(isinstance(a, fx.Node) for a in node.args):
                continue
            left, right = node.args
            for result, source in ((left, self.passed(right)), (right, self.passed(left))):
                assert isinstance(result, fx.Node) and isinstance(source, fx.Node)
                found = self.branch(node, result, source) if result is not source else None
                if found is not None:
                    yield found
                    break


def _common_prefix(names: Iterable[str]) -> str:
    """The innermost module that contains all of them; the first one itself when that is the network."""
    names = list(names)
    parts = [name.split(".") for name in names]
    prefix = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        prefix.append(column[0])
    return ".".join(prefix) or names[0]


def branches(model: nn.Module) -> tuple[list[Branch], dict[str, str]]:
    """All residual branches in execution order, named differently, and the modules that could not be looked into.

    Raises whatever tracing the network's outermost module raises.
    """
    finder = _Finder(model)
    found = list(finder)
    times = Counter(branch.name for branch in found)
    # A transformer's layer holds two branches; each is then called by the part of the layer that ends it.
    named = [replace(b, name=_part(b)) if times[b.name] > 1 else b for b in found]
    times = Counter(branch.name for branch in named)
    return [replace(b, name=b.gate) if times[b.name] > 1 else b for b in named], finder.opaque


def _part(branch: Branch) -> str:
    """The child of the innermost module around the branch that its gate lies in."""
    rest = branch.gate.removeprefix(f"{branch.name}.")
    return branch.gate if rest == branch.gate else f"{branch.name}.{rest.split('.')[0]}"
