"""Structure and hypernetwork found on one data set, used on another: does the search have to be run again?"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn

from passdeploy import data as datasets
from passdeploy.compare.runner import Arm
from passdeploy.errors import BadInput
from passdeploy.search.method import Method, SearchContext, SearchResult, constant_result, more_methods
from passdeploy.search.prompt import InputStage
from passdeploy.search.state import prepare
from passdeploy.study.base import Findings, Lab, differences, refuse_unsearched, register_study
from passdeploy.study.halves import halves
from passdeploy.subject import load_subject
from passdeploy.workspace import Workspace

PASS = Arm("pass", "pass")
OWN = "searched here"


def _methods_of(folder: Path) -> dict[str, tuple[str, Method]]:
    """Methods around a finished search elsewhere, by title; their names carry its digest, so that resuming notices.

    Raises:
        BadInput: It found nothing, since there was nothing to do.
    """
    digest = Workspace(folder).digest("search")[:8]
    found = SearchResult.load(folder / "search")
    refuse_unsearched(found, "transfer")

    def structure(context: SearchContext) -> SearchResult:
        result = constant_result(context, found.importance[0], found.allocator, found.depth)
        result.importance, result.blocks = found.importance, found.blocks
        return result

    @torch.no_grad()
    def hypernetwork(context: SearchContext) -> SearchResult:
        """Applied to this network's statistics and prior, under its own prompt; nothing is trained.

        Which blocks go was tried there.
        """
        search = prepare(context)
        search.hyper.load_state_dict(found.extra)
        if found.stage:  # the images there may be of another size
            height, width = found.stage["prompt"].shape[-2:]
            preprocess = dataclasses.replace(context.data.preprocess, size=(height, width))
            search.model.stage = InputStage(preprocess, search.model.stage.kind, search.model.stage.width)
        search.model.stage.load_state_dict(found.stage)
        importance = []
        for which, ratio in enumerate(context.ratios):
            scores = search.scores(search.cuts(search.open(), ratio, blocks=found.blocks_of(which)), ratio)
            importance.append({name: torch.from_numpy(values.copy()) for name, values in scores.items()})
        result = constant_result(context, importance[0], found.allocator, found.depth)
        result.importance, result.blocks = importance, found.blocks
        return result

    around = {"its structure": structure, "its hypernetwork": hypernetwork}
    return {title: (f"{title.replace(' ', '-')}-{digest}", method) for title, method in around.items()}


@register_study("transfer")
def transfer(lab: Lab) -> Findings:
    """Searches on one data set, then compares on the other; without ``--to`` they are halves of one set's classes."""
    if isinstance(lab.model, nn.Module):
        raise BadInput("study transfer: each data set has a network of its own; give a function that builds it")
    source = load_subject(lab.config, lab.model, lab.data).data
    own: dict[str, Any] = {"weights": None}  # those in the configuration are of its data, whole
    if lab.to is None:
        source, target = halves(source)
    else:
        target = datasets.load(lab.to, size=lab.config.input_size)
    (seed, *_) = lab.seeds
    found_on = lab.config.model_copy(update={"data": source.name, "seed": seed, **(own if lab.to is None else {})})
    there = Lab(found_on, (seed,), lab.out, lab.ui, lab.model, failed=lab.failed)
    searched = there.plan([PASS], folder="source", data=source)
    first = there.run(searched)
    found = _methods_of(searched.folder(PASS, seed))
    arms = [
        Arm(OWN, "pass"),
        *(Arm(f"{title} from there", name) for title, (name, _) in found.items()),
        Arm("sensitivity alone", "sensitivity"),
        Arm("l1", "l1"),
    ]
    config = lab.config.model_copy(update={"data": target.name, **own})
    with more_methods(dict(found.values())):
        rows = lab.run(lab.plan(arms, config=config, folder="target", data=target))
    conclusion = [
        f"Searched on {source.name} (seed {seed}), used on {target.name}; each has its own dense network.",
        *differences(rows, OWN),
    ]
    return Findings(
        "does a structure or a hypernetwork found on one data set serve another?",
        rows,
        conclusion,
        OWN,
        numbers={"source_rows": [row.to_json() for row in first]},
    )
