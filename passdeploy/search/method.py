"""What every way of choosing a structure shares: its inputs, its result, and the registry.

A method scores the units; how many of them stay is decided by its allocator on the latency model, and by the closed
loop on measured engines. PASS and each baseline are one file that calls `register_method`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from passdeploy.checkpoint import Checkpoint
from passdeploy.config import RunConfig
from passdeploy.data.base import ImageData
from passdeploy.errors import BadInput, nearest
from passdeploy.feeding import steps_per_epoch
from passdeploy.groups import Groups, Operator
from passdeploy.search import latency_allocator  # noqa: F401 (registers the allocators that are files of their own)
from passdeploy.search.allocator import ALLOCATORS, Allocator, Importance, Predictor, width_grids
from passdeploy.workspace import read_json, write_json


@dataclass(frozen=True)
class SearchContext:
    """What a method may use.

    Attributes:
        network: The dense network, trained (normalised images -> logits). Methods work on a copy.
        data: Only its training split is used.
        groups: Of the network.
        operators: What it executes, as functions of the kept units.
        predictor: The latency model; a torch-differentiable `predict_soft` beside `predict_many`.
        step: Channels in which the target's latency moves.
        ratios: Asked shares of the dense latency, one per budget.
        config: Of the run.
        checkpoint: Where a long search keeps its state.
        progress: Called with (done, total, state).
    """

    network: nn.Module
    data: ImageData
    groups: Groups
    operators: tuple[Operator, ...]
    predictor: Predictor
    step: int
    ratios: tuple[float, ...]
    config: RunConfig
    checkpoint: Checkpoint = field(default_factory=lambda: Checkpoint(None))
    progress: Callable[[int, int, str], None] = lambda done, total, state: None

    def allocator(self, kind: str) -> Allocator:
        """The allocator of that name over this network and latency model."""
        search = self.config.search
        grids = width_grids(self.groups, self.step, search.keep_at_least, search.depth)
        return ALLOCATORS[kind](self.groups, self.predictor, grids)


@dataclass
class SearchResult:
    """What a search returns.

    Attributes:
        importance: Per budget, per group, the importance (> 0) of each unit.
        allocator: Name of the allocator that turns it into structures.
        network: State of the network that surgery starts from: the dense one's, or co-adapted.
        stage: State of the input stage (the prompt); empty without one.
        extra: Other tensors worth keeping (the hypernetwork).
        depth: Whether whole blocks may go.
        blocks: Per budget, whether each of these depth groups stays, whatever its importance; empty: importance decides
            of all.
        adapted: Whether the weights were trained under the masks: fine-tuning then goes on at the peak of its rate.
        unspent_steps: Steps of the search that the method did without: fine-tuning gets them, so that every method
            costs the same.
        ratios: Per budget, the share of the dense latency that was searched for, as the context has it; 1: the network
            was left whole.
        curves: For the report.
        health: Checks on the search, ``{"name", "ok", "message"}`` each.
    """

    importance: list[dict[str, Tensor]]
    allocator: str
    network: dict[str, Tensor]
    stage: dict[str, Tensor] = field(default_factory=dict)
    extra: dict[str, Tensor] = field(default_factory=dict)
    depth: bool = True
    blocks: list[dict[str, bool]] = field(default_factory=list)
    adapted: bool = False
    unspent_steps: int = 0
    ratios: list[float] = field(default_factory=list)
    curves: dict[str, list[float]] = field(default_factory=dict)
    health: list[dict[str, Any]] = field(default_factory=list)

    def importance_arrays(self, budget: int) -> Importance:
        """Importance for one budget, as the allocators take it."""
        return {name: values.double().numpy() for name, values in self.importance[budget].items()}

    def blocks_of(self, budget: int) -> dict[str, bool]:
        """Whether depth groups stay, for one budget, where that is decided."""
        return self.blocks[budget] if self.blocks else {}

    def left_whole(self, budget: int) -> bool:
        """Whether nothing was searched for, for one budget: its scores say nothing."""
        return bool(self.ratios) and self.ratios[budget] >= 1

    def save(self, folder: Path) -> None:
        """Writes `scores`, `network`, `stage` and `hypernetwork.safetensors`, and `search.json`."""
        folder.mkdir(parents=True, exist_ok=True)
        scores = {f"{i}/{name}": v.contiguous() for i, entry in enumerate(self.importance) for name, v in entry.items()}
        for name, tensors in (
            ("scores", scores),
            ("network", self.network),
            ("stage", self.stage),
            ("hypernetwork", self.extra),
        ):
            save_file(
                {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, folder / f"{name}.safetensors"
            )
        write_json(
            folder / "search.json",
            {
                "allocator": self.allocator,
                "depth": self.depth,
                "blocks": self.blocks,
                "adapted": self.adapted,
                "unspent_steps": self.unspent_steps,
                "ratios": self.ratios,
                "budgets": len(self.importance),
                "groups": list(self.importance[0]),
                "curves": self.curves,
                "health": self.health,
            },
        )

    @classmethod
    def load(cls, folder: Path) -> SearchResult:
        """Reads what `save` wrote."""
        facts = read_json(folder / "search.json")
        scores = load_file(folder / "scores.safetensors")
        return cls(
            importance=[{name: scores[f"{i}/{name}"] for name in facts["groups"]} for i in range(facts["budgets"])],
            allocator=facts["allocator"],
            network=load_file(folder / "network.safetensors"),
            stage=load_file(folder / "stage.safetensors"),
            extra=load_file(folder / "hypernetwork.safetensors"),
            depth=facts["depth"],
            blocks=facts.get("blocks", []),  # of a search before there were trials: none
            adapted=facts["adapted"],
            unspent_steps=facts["unspent_steps"],
            ratios=facts.get("ratios", []),  # of a search that did not say: unknown
            curves=facts["curves"],
            health=facts["health"],
        )


Method = Callable[[SearchContext], SearchResult]
_REGISTRY: dict[str, Method] = {}
_UNTRAINED: set[str] = set()


def register_method(name: str, trains: bool = True) -> Callable[[Method], Method]:
    """Registers a method under the name that ``--method`` takes.

    Args:
        name: The name.
        trains: Whether it trains in its search: it then depends on `SearchConfig.TRAINING`.
    """

    def add(method: Method) -> Method:
        _REGISTRY[name] = method
        (_UNTRAINED.discard if trains else _UNTRAINED.add)(name)
        return method

    return add


@contextmanager
def more_methods(found: Mapping[str, Method]) -> Iterator[None]:
    """Methods that are there inside of the block only, as those around one finished search: `all` means no such."""
    before = dict(_REGISTRY)
    _REGISTRY.update(found)
    try:
        yield
    finally:
        for name in found:
            if name in before:
                _REGISTRY[name] = before[name]
            else:
                del _REGISTRY[name]


def methods() -> dict[str, Method]:
    """All methods by name."""
    import passdeploy.search.baselines as baselines

    importlib.import_module("passdeploy.search.trainer")
    for module in pkgutil.iter_modules(baselines.__path__):
        importlib.import_module(f"{baselines.__name__}.{module.name}")
    return dict(sorted(_REGISTRY.items()))


def get_method(name: str) -> Method:
    """Raises `BadInput` with the nearest names when there is none of that name."""
    known = methods()
    if name not in known:
        raise BadInput(f"--method {name}: no such method{nearest(name, known)}")
    return known[name]


def trains(name: str) -> bool:
    """Whether a method depends on how a search is trained; yes, of one that is not registered yet."""
    methods()
    return name not in _UNTRAINED


def search_steps(context: SearchContext) -> int:
    """Training steps that a search may take."""
    settings = context.config.search
    per_epoch = steps_per_epoch(context.data.train, context.config.train_batch)
    return max(settings.min_steps, round(settings.epochs * per_epoch))


def constant_result(
    context: SearchContext, importance: dict[str, Tensor], allocator: str, depth: bool = False
) -> SearchResult:
    """The result of a method that scores once: the same importance for each budget, weights and steps untouched."""
    return SearchResult(
        [{name: values.double().clamp_min(1e-12) for name, values in importance.items()}] * len(context.ratios),
        allocator,
        dict(context.network.state_dict()),
        depth=depth,
        unspent_steps=search_steps(context),
    )


def training_images(data: ImageData, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """`count` training images (float32, [0, 1]) and labels, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed * 7919 + 17)
    indices = torch.randperm(len(data.train), generator=generator)[:count]
    return data.train.images(indices), data.train.labels[indices]


def affordable(sequence: Sequence[int], budget: float, least: int, most: int) -> int:
    """How many images a pass may take so that ``images * sum(sequence)`` operations stay within `budget`."""
    return int(max(least, min(most, budget / max(1, sum(sequence)))))
