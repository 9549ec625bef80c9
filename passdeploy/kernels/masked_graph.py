"""Puts `masked_affine_act` into a network's graph: masks act on the activations that consumers read.

Where such an activation comes straight out of a ReLU (or SiLU, ...) that nothing but consumers under the same mask
read, the operator takes that function's place: masking then costs no pass over memory of its own. Elsewhere it is an
operator of its own, or, in a search, is left to the consumer's weights (`passdeploy.groups.Masker`).
"""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from passdeploy.errors import BadInput
from passdeploy.kernels.masked_op import masked_affine_act

MASKS = "passdeploy_masks"
"""Buffer of the graph: the masks of all groups end to end and a 1, as `Masker.vector` gives them."""
_MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    nn.GELU: "gelu",
    nn.Hardswish: "hardswish",
}
_FUNCTIONS: dict[Any, str] = {
    **dict.fromkeys((F.relu, torch.relu, torch.relu_, "relu", "relu_"), "relu"),
    F.relu6: "relu6",
    F.silu: "silu",
    F.hardswish: "hardswish",
}


def masked_input(x: Tensor, masks: Tensor, index: Tensor, activation: str, last: bool) -> Tensor:
    """``activation(x) * mask`` by the kernel; by PyTorch where the channels come last, or of three dimensions.

    Args:
        x: (N, C, ...), or (N, ..., C) if `last`: linear layers read tokens and pixels so.
        masks: Of all groups, as `Masker.vector` gives them.
        index: (C,) positions of the channels' masks.
        activation: One of the kernel's.
        last: Whether the channels are the last dimension.
    """
    mask = masks[index]
    if not kernel_takes(x, last):
        return plain_input(x, masks, index, activation, last)
    # The activations are 0 at 0, so that masking before or after them is the same.
    ones, zeros = torch.ones_like(mask), torch.zeros_like(mask)
    return masked_affine_act(x, mask, ones, zeros, None, activation)


def plain_input(x: Tensor, masks: Tensor, index: Tensor, activation: str, last: bool) -> Tensor:
    """The same in operators that every ONNX backend knows."""
    mask = masks[index].to(x.dtype)
    return _activate(x, activation) * (mask if last else mask.view(-1, *[1] * (x.dim() - 2)))


def kernel_takes(x: Tensor, last: bool) -> bool:
    """Whether the channels lie where the kernel expects them: dimension 1 of (N, C) or (N, C, H, W)."""
    return x.dim() == 2 or (x.dim() == 4 and not last)


def _activate(x: Tensor, activation: str) -> Tensor:
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "none": lambda t: t,
        "relu": F.relu,
        "relu6": F.relu6,
        "silu": F.silu,
        "gelu": F.gelu,
        "hardswish": F.hardswish,
    }
    return functions[activation](x)


def _augmented(name: str) -> Callable[[Any, Any], Any]:
    """What ``x += y`` does: a tensor is changed in place, for whoever else has it; a number is another one then."""
    work = getattr(operator, name)

    def assign_(x: Any, y: Any) -> Any:
        return work(x, y)

    assign_.__name__ = assign_.__qualname__ = f"{name}_"
    return assign_


# By name in this module, where the code that fx writes looks for them.
iadd_, isub_, imul_, itruediv_ = (_augmented(name) for name in ("iadd", "isub", "imul", "itruediv"))


class _Proxy(fx.Proxy):
    """fx's own takes ``x += y`` for ``x = x + y``, and what has another name for x would miss it."""

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", iadd_, (self, other), {})

    def __isub__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", isub_, (self, other), {})

    def __imul__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", imul_, (self, other), {})

    def __itruediv__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", itruediv_, (self, other), {})


class _Tracer(fx.Tracer):
    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)


def _drawn() -> tuple[object, ...]:
    """States of the random generators that code of a network's may draw from."""
    numpy: Any = np.random.get_state()  # noqa: NPY002 - which generators of their own do not touch
    return torch.get_rng_state().tolist(), random.getstate(), numpy[1].tobytes(), numpy[2]


def trace(model: nn.Module, evaluating: bool = False) -> fx.GraphModule:
    """The network's graph; its modules and parameters are the network's own.

    Args:
        model: The network.
        evaluating: Whether the graph is only ever going to be run as it is traced, in eval mode.

    Raises:
        BadInput: It can't be traced, or what it does was fixed while it was traced.
    """
    before = _drawn()
    try:
        graph = fx.GraphModule(model, _Tracer().trace(model), type(model).__name__)
    except Exception as error:
        line = str(error).strip().splitlines()
        told = line[0][:160] if line else type(error).__name__
        raise BadInput(f"the network's graph cannot be traced ({told})") from None
    if _drawn() != before:  # blocks that are dropped at random: one draw would stand for all
        raise BadInput("the network's graph cannot be traced (it draws random numbers in Python)")
    for node in graph.graph.nodes:
        fixed = node.op == "call_function" and "training" in node.kwargs
        if fixed and not (evaluating and node.kwargs["training"] is False):
            raise BadInput(f"the network's graph cannot be traced ({node.name} is told whether it trains)")
    return graph


def activation_of(graph: fx.GraphModule, node: fx.Node) -> str | None:
    """Which of the kernel's activations a node is; None for any other."""
    if node.op == "call_module":
        module = graph.get_submodule(str(node.target))
        kind = _MODULES.get(type(module))
        exact = not isinstance(module, nn.GELU) or module.approximate == "none"
        return kind if exact else None
    if node.op in ("call_function", "call_method"):
        return _FUNCTIONS.get(node.target) if set(node.kwargs) <= {"inplace"} else None
    return None


def _works_in_place(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node overwrites the first thing that it reads."""
    if node.op == "call_module":
        return bool(getattr(graph.get_submodule(str(node.target)), "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return bool(node.kwargs.get("inplace", False)) or (name.endswith("_") and not name.endswith("__"))


def _is_overwritten(graph: fx.GraphModule, read: fx.Node) -> bool:
    """Whether what an activation reads is overwritten, by it or by others, and there are others.

    The operator would leave as it is what they expect to be changed; and it keeps for its gradient what it has read,
    which PyTorch's activations don't: they keep what they return.
    """
    works_on_it = (user for user in read.users if user.all_input_nodes[0] is read)
    return len(read.users) > 1 and any(_works_in_place(graph, user) for user in works_on_it)


def insert_masks(
    graph: fx.GraphModule,
    sites: Mapping[str, Tensor],
    total: int,
    *,
    everywhere: bool,
    function: Callable[..., Tensor] = masked_input,
) -> set[str]:
    """Adds the operator in front of consumers, in place.

    Args:
        graph: Of `trace`.
        sites: Qualified name of a consumer -> (channels,) position of every input channel's mask in the vector.
        total: Length of the vector less one.
        everywhere: Whether consumers whose activation can't be replaced get an operator of their own.
        function: What is inserted, called as `masked_input` is.

    Returns:
        The consumers that are masked so.
    """
    device = next(iter(graph.parameters())).device
    graph.register_buffer(MASKS, torch.ones(total + 1, device=device), persistent=False)
    consumers: dict[fx.Node, str] = {}
    for node in graph.graph.nodes:
        if node.op == "call_module" and node.target in sites and node.args and not node.kwargs:
            consumers[node] = str(node.target)
    calls: dict[str, int] = {}
    for name in consumers.values():
        calls[name] = calls.get(name, 0) + 1
    done: set[str] = set()
    sources: dict[fx.Node, list[fx.Node]] = {}
    for node, name in consumers.items():
        if calls[name] == 1:  # a module that is called twice has one weight for both
            sources.setdefault(node.args[0], []).append(node)  # type: ignore[arg-type]
    for source, users in sources.items():
        first = sites[consumers[users[0]]]
        # Channels come last for linear layers, whatever the number of dimensions.
        last = {user: isinstance(graph.get_submodule(consumers[user]), nn.Linear) for user in users}
        alike = [user for user in users if last[user] == last[users[0]]]
        same = [user for user in alike if torch.equal(sites[consumers[user]], first)]
        kind = activation_of(graph, source)
        replaces = (
            kind is not None
            and set(source.users) == set(same)
            and not _is_overwritten(graph, source.all_input_nodes[0])
        )
        if not replaces and not everywhere:
            continue
        for index, members in enumerate([same] if replaces else [[user] for user in users]):
            where = sites[consumers[members[0]]]
            buffer = f"passdeploy_index_{source.name}_{index}"
            graph.register_buffer(buffer, where.to(device), persistent=False)
            with graph.graph.inserting_before(members[0] if not replaces else source):
                masks, positions = graph.graph.get_attr(MASKS), graph.graph.get_attr(buffer)
                taken = source.all_input_nodes[0] if replaces else source  # modules may be given it by name
                done_before = kind if replaces else "none"
                made = graph.graph.call_function(function, (taken, masks, positions, done_before, last[members[0]]))
            for member in members:
                member.replace_input_with(source, made)
                done.add(consumers[member])
        if replaces:
            graph.graph.erase_node(source)
    graph.graph.lint()
    graph.recompile()
    return done
