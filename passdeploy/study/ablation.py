"""What each part of PASS contributes: prompt, recurrence, statistics, signal, allocator, budget, depth, trials, ..."""

from __future__ import annotations

from passdeploy.compare.runner import Arm
from passdeploy.study.base import Findings, Lab, differences, register_study

PARTS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm("no prompt", "pass-no-prompt"),
        Arm("no recurrence", "pass-no-recurrence"),
        Arm("no statistics", "pass-no-statistics"),
        Arm("gradient signal", "pass", {"search": {"signal": "gradient"}}),
        Arm("gradient, no latency term", "pass", {"search": {"signal": "gradient", "latency_weight": 0.0}}),
        Arm("global threshold", "pass", {"search": {"allocator": "global"}}),
        Arm("no depth", "pass", {"search": {"depth": False}}),
        Arm("no sensitivity prior", "pass", {"search": {"prior": "none"}}),
        Arm("no trials", "pass", {"search": {"trials": 1}}),
        Arm("no trials, frozen weights", "pass", {"search": {"co_adapt": False}}),
    )
}
ALONE = "no trials, a search per budget"
"""With trials it would not tell what sharing the weights costs: those of one budget go on with the winner's."""


@register_study("ablation")
def ablation(lab: Lab) -> Findings:
    """Each arm leaves one part out; one search serves all budgets, but for the arm that does without that."""
    arms = [Arm("pass", "pass"), *PARTS.values()]
    if len(lab.config.latency) > 1:
        # What conditioning on the budget costs: the same search, once per budget.
        arms += [Arm(ALONE, "pass", {"search": {"trials": 1}}, latency=(budget,)) for budget in lab.config.latency]
    rows = lab.run(lab.plan(arms))
    conclusion = [*differences(rows, "pass"), 'Arms without trials are to be held against "no trials".']
    return Findings("what does each part of PASS contribute?", rows, conclusion)
