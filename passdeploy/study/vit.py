"""A vision transformer against a convolutional network at equal measured speed-up: what does each lose?"""

from __future__ import annotations

from passdeploy.compare.rows import Row
from passdeploy.compare.runner import Arm
from passdeploy.compare.statistics import Mean, budgets, cells, mean
from passdeploy.compare.table import markdown
from passdeploy.config import RunConfig
from passdeploy.study.base import BROUGHT, SPLIT, Findings, Lab, differences, register_study

ARMS = (Arm("pass", "pass"), Arm("l1", "l1"))
TRANSFORMER = "passdeploy.study.nets:small_vit"
SIZE = (32, 32)
"""The only one that the transformer takes: its positions are learnt."""


def lost(rows: list[Row], method: str, budget: str) -> Mean | None:
    """Accuracy lost against the network's own dense one, paired by seed."""
    return mean(
        [
            row.accuracy - row.dense_accuracy
            for row in rows
            if (row.split, row.method, row.budget) == (SPLIT, method, budget) and row.accuracy is not None
        ]
    )


def transformer(config: RunConfig) -> RunConfig:
    """The same settings for the transformer, whose images are resized to what it takes."""
    return config.model_copy(update={**BROUGHT, "model": TRANSFORMER, "input_size": SIZE})


@register_study("vit")
def vit(lab: Lab) -> Findings:
    """The lab's network and a small transformer, each trained here unless its weights are there."""
    networks = {str(lab.config.model): lab.config, TRANSFORMER: transformer(lab.config)}
    sections, conclusion, numbers = [], [], {}
    everything: list[Row] = []
    for name, config in networks.items():
        short = name.rpartition(":")[2]
        rows = lab.run(lab.plan(ARMS, config=config, folder=short))
        everything += rows
        each = {row.seed: row.dense_accuracy for row in rows if row.split == SPLIT}  # trained here: one per seed
        dense = sum(each.values()) / len(each)
        for budget in budgets(rows):
            for arm in ARMS:
                change = lost(rows, arm.name, budget)
                if change is not None:
                    text = f"{100 * change.value:+.2f} points of {100 * dense:.2f} %"
                    conclusion.append(f"{short} at {budget}, {arm.name}: {text}.")
                else:
                    at = [c for c in cells(rows, SPLIT, "pass") if (c.method, c.budget) == (arm.name, budget)]
                    why = at[0].statuses[0].replace("_", " ") if at else "did not finish"
                    conclusion.append(f"{short} at {budget}, {arm.name}: {why}.")
        conclusion += [f"{short}: {sentence}" for sentence in differences(rows, "pass")]
        sections.append((short, markdown(rows, SPLIT, "pass")))
    numbers["rows"] = [row.to_json() for row in everything]
    return Findings(
        "does a transformer lose more than a convolutional network at the same measured speed-up?",
        [],
        conclusion,
        "pass",
        sections,
        numbers,
    )
