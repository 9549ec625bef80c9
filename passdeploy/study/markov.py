"""Is the previous group's mask enough, where a group reads many earlier ones? On DenseNet and a U-shaped network."""

from __future__ import annotations

from passdeploy.compare.rows import Row
from passdeploy.compare.runner import Arm
from passdeploy.compare.table import markdown
from passdeploy.study.base import BROUGHT, SPLIT, Findings, Lab, differences, register_study

NETWORKS = ("small_densenet", "small_unet")
PREVIOUS, ALL = "previous mask", "all masks"
ARMS = (Arm(PREVIOUS, "pass"), Arm(ALL, "pass", {"search": {"memory": "all"}}))


@register_study("markov")
def markov(lab: Lab) -> Findings:
    """Two arms on each network; the dense networks are trained here first."""
    rows: list[Row] = []
    sections, conclusion = [], []
    for name in NETWORKS:
        config = lab.config.model_copy(update={**BROUGHT, "model": f"passdeploy.study.nets:{name}"})
        found = lab.run(lab.plan(ARMS, config=config, folder=name))
        conclusion += [f"{name}: {sentence}" for sentence in differences(found, PREVIOUS)]
        sections.append((name, markdown(found, SPLIT, PREVIOUS)))
        rows += found
    findings = Findings(
        "is the previous group's mask enough where a group reads many earlier ones?", [], conclusion, PREVIOUS, sections
    )
    findings.numbers["rows"] = [row.to_json() for row in rows]
    return findings
