"""Does the learnt prompt carry anything: does it move the scores, and do its moves follow known channel importance?"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from passdeploy.compare.runner import Arm
from passdeploy.pipeline import Run
from passdeploy.reporting.markdown import table
from passdeploy.reporting.picture import prompt_picture
from passdeploy.search.baselines.gradients import taylor
from passdeploy.search.baselines.l1 import filter_norms
from passdeploy.search.method import SearchResult
from passdeploy.search.state import prepare
from passdeploy.stages.search import search_context
from passdeploy.study.base import Findings, Lab, refuse_unsearched, register_study
from passdeploy.workspace import write_atomic

ARM = Arm("pass", "pass")
STRANGERS = 20
"""Random prompts of the learnt one's size, for what any prompt does to the scores."""


def ranks(values: Sequence[float]) -> np.ndarray:
    """Ranks from 0, ties share their mean."""
    array = np.asarray(values, dtype=float)
    order = array.argsort(kind="stable")
    found = np.empty(len(array))
    found[order] = np.arange(len(array))
    for value in np.unique(array):
        same = array == value
        found[same] = found[same].mean()
    return found


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Rank correlation; None where one of them does not vary."""
    x, y = ranks(a), ranks(b)
    if len(x) < 3 or x.std() == 0 or y.std() == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def within_groups(a: dict[str, Tensor], b: dict[str, Tensor]) -> float | None:
    """Mean rank correlation inside the channel groups, weighted by their units."""
    found = [(s, len(a[name])) for name in b if (s := spearman(a[name].tolist(), b[name].tolist())) is not None]
    return None if not found else sum(s * n for s, n in found) / sum(n for _, n in found)


@torch.no_grad()
def moves(run: Run) -> dict[str, Any]:
    """How the scores of a finished search move with the prompt, and what the moves correlate with."""
    result = SearchResult.load(run.space.folder("search"))
    refuse_unsearched(result, "prompt-content")
    context = search_context(run)
    search = prepare(context)
    search.hyper.load_state_dict(result.extra)
    search.model.stage.load_state_dict(result.stage)
    learnt, ratio = search.prompt(), context.ratios[0]
    cuts = search.cuts(search.open(), ratio, blocks=result.blocks_of(0))  # what the scores decide at the budget
    frame = torch.ones(()) if search.model.stage.prompt is None else search.model.stage.frame

    def scores(prompt: Tensor) -> dict[str, Tensor]:
        values, _ = search.hyper(prompt, search.statistics, search.prior, cuts, ratio)
        return search.named(values)

    base, with_prompt = scores(torch.zeros_like(learnt)), scores(learnt)
    channels = [group.name for group in context.groups.groups if group.kind == "channel"]
    moved = {name: with_prompt[name] - base[name] for name in channels}
    generator = torch.Generator().manual_seed(run.config.seed)
    strangers = []
    for _ in range(STRANGERS):
        other = scores(torch.randn(learnt.shape, generator=generator) * learnt.std() * frame)
        strangers.append(float(torch.cat([(other[name] - base[name]).abs() for name in channels]).mean()))
    with torch.enable_grad():
        gradient = taylor(context)
    known = {
        "L1": filter_norms(context),
        "Taylor": {name: gradient[name] for name in channels},
        "prior (measured sensitivity)": {name: search.prior[context.groups.names.index(name)] for name in channels},
    }
    embedding = search.hyper.encoder(learnt)
    learned = {name: with_prompt[name] - search.prior[context.groups.names.index(name)] for name in channels}
    return {
        "prompt_std": float(learnt.std()),
        "prompt_largest": float(learnt.abs().max()),
        "embedding_norm": float(embedding.norm()),
        "embedding_change": float((embedding - search.hyper.encoder(torch.zeros_like(learnt))).norm()),
        "mean_move_of_log_score": float(torch.cat([moved[name].abs() for name in channels]).mean()),
        "mean_move_random_prompt": float(np.mean(strangers)),
        "mean_learnt_correction": float(torch.cat([learned[name].abs() for name in channels]).mean()),
        "move_against": {kind: within_groups(moved, values) for kind, values in known.items()},
        "score_against": {
            kind: within_groups({name: with_prompt[name] for name in channels}, values)
            for kind, values in known.items()
        },
        "png": prompt_picture(learnt.numpy()) if learnt.abs().max() > 0 else None,
    }


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:+.2f}"


@register_study("prompt-content")
def prompt_content(lab: Lab) -> Findings:
    """One PASS run per seed, looked into."""
    lab.config = lab.config.model_copy(update={"latency": lab.config.latency[:1]})
    plan = lab.plan([ARM])
    rows = lab.run(plan)
    found: dict[str, dict[str, Any]] = {}
    for seed in sorted({row.seed for row in rows}):
        run = Run(plan.arm_config(ARM, seed), plan.folder(ARM, seed), lab.ui, model=lab.model, data=lab.data)
        found[str(seed)] = moves(run)
    means = {
        key: float(np.mean([entry[key] for entry in found.values()]))
        for key in ("mean_move_of_log_score", "mean_move_random_prompt", "mean_learnt_correction")
    }
    move, stranger = means["mean_move_of_log_score"], means["mean_move_random_prompt"]
    correction = means["mean_learnt_correction"]
    conclusion = [
        f"The learnt prompt moves a unit's log score by {move:.2g} in the mean; a random prompt of its size by "
        f"{stranger:.2g}; all that the hypernetwork adds to the prior is {correction:.2g}.",
        "The scores depend on the prompt's content."
        if move > 0.1 * correction and move > 1.5 * stranger
        else "The scores hardly depend on the prompt's content: what is learnt sits in the hypernetwork's weights.",
    ]
    body = []
    for label, entry in found.items():
        body += [
            (label, kind, _number(entry["move_against"][kind]), _number(entry["score_against"][kind]))
            for kind in entry["move_against"]
        ]
    strongest = max(abs(entry["move_against"][k] or 0) for entry in found.values() for k in entry["move_against"])
    conclusion.append(
        f"The prompt's moves correlate with known channel importance by at most {strongest:.2f} (Spearman, in groups)."
    )
    pictures = []
    for label, entry in found.items():
        if entry["png"]:
            write_atomic(lab.out / f"prompt-{label}.png", base64.b64decode(entry["png"].partition(",")[2]))
            pictures.append(f"![prompt of seed {label}](prompt-{label}.png)")
    correlation = table(("seed", "importance", "prompt's moves", "final scores"), body, 2)
    return Findings(
        "does the prompt carry anything about which channels matter?",
        rows,
        conclusion,
        sections=[
            ("Rank correlation inside groups, weighted by units", correlation),
            ("Learnt prompts", " ".join(pictures) or "The prompt stayed zero."),
        ],
        numbers={"seeds": {seed: {k: v for k, v in entry.items() if k != "png"} for seed, entry in found.items()}},
    )
