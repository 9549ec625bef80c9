"""Which prompt: additive or expansive, and how large. Accuracy, what it costs in latency, how long the search takes."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from passdeploy.compare.runner import Arm
from passdeploy.engines.base import CompileInput, Engine, get_backend
from passdeploy.export import export_onnx
from passdeploy.latency.measure import BENCH
from passdeploy.opening import free_folder
from passdeploy.pipeline import Run
from passdeploy.reporting import format as f
from passdeploy.reporting.markdown import table
from passdeploy.search.prompt import InputStage, Prompted
from passdeploy.study.base import SPLIT, Findings, Lab, differences, register_study
from passdeploy.timing import compare_engines

NONE = "no prompt"


def arms(size: tuple[int, int]) -> list[Arm]:
    """Prompts of several kinds and sizes, as shares of the image."""
    narrow, wide = max(1, min(size) // 16), max(2, min(size) // 8)

    def arm(name: str, kind: str, width: int) -> Arm:
        return Arm(name, "pass", {"prompt": {"kind": kind, "width": width}})

    return [
        arm("additive, whole image", "additive", 0),
        arm(f"additive, frame of {narrow}", "additive", narrow),
        arm(f"additive, frame of {wide}", "additive", wide),
        arm(f"expansive, border of {narrow}", "expansive", narrow),
        arm(f"expansive, border of {wide}", "expansive", wide),
        arm(NONE, "none", 0),
    ]


def prompt_cost(run: Run, variants: list[Arm]) -> dict[str, Any]:
    """Latency of the dense network with each prompt over the one without, all engines interleaved.

    The values of a prompt do not matter, so these are the untrained ones.
    """
    network = run.subject.with_state(run.dense_state())
    backend, data, target = get_backend(run.target.backend), run.subject.data, run.target
    images = run.validation_images
    engines: dict[str, Engine] = {}
    with tempfile.TemporaryDirectory(prefix="passdeploy-") as folder:
        for arm in sorted(variants, key=lambda arm: arm.name != NONE):
            prompt = arm.settings["prompt"]
            stage = InputStage(data.preprocess, prompt["kind"], prompt["width"])
            path = Path(folder) / "model.onnx"
            export_onnx(Prompted(stage, network).eval(), path, data.input_shape, target.batch)
            engines[arm.name] = backend.compile(CompileInput(onnx=path, samples=images), target)
    compared = compare_engines(engines, target, images[: target.batch], run.config.scope, BENCH)
    costs = {}
    for name in engines:
        if name != NONE:
            ratio = compared.ratio(name).inverse()
            known = ratio.to_json()
            costs[name] = {"ratio": known["value"], "low": known["low"], "high": known["high"]}
    return costs


@register_study("prompts")
def prompts(lab: Lab) -> Findings:
    """All prompts at all budgets."""
    first = Run(lab.config, free_folder(lab.config, lab.out / "cost"), lab.ui, model=lab.model, data=lab.data)
    variants = arms(first.subject.data.preprocess.size)
    if len(first.subject.task.output_shape(first.subject.data)) > 1:  # labels, one per pixel, would have to shrink too
        variants = [arm for arm in variants if arm.settings["prompt"]["kind"] != "expansive"]
    rows = lab.run(lab.plan(variants, data=first.subject.data))
    costs: dict[str, Any] = {}
    if first.measured:
        first.shared("dense")
        costs = prompt_cost(first, variants)
    body, conclusion = [], differences(rows, NONE)
    for arm in variants:
        own = [row for row in rows if row.method == arm.name and row.split == SPLIT]
        cost = costs.get(arm.name)
        extra = f"{100 * (cost['ratio'] - 1):+.1f} %" if cost else f.NONE
        interval = (
            f"{100 * (cost['low'] - 1):+.1f} to {100 * (cost['high'] - 1):+.1f} %"
            if cost and cost["low"] is not None and cost["high"] is not None
            else f.NONE
        )
        seconds = sum(row.seconds.get("search", 0.0) for row in own) / max(1, len(own))
        body.append((arm.name, extra, interval, f.seconds(seconds)))
    section = (
        "Latency of the dense engine with the prompt over the one without, interleaved in one process; time of the "
        "search, mean over its runs.\n\n" + table(("prompt", "extra latency", "95 %", "search"), body)
    )
    return Findings(
        "which visual prompt, how large, and what does it cost?",
        rows,
        conclusion,
        NONE,
        [("What a prompt costs", section)],
        {"extra_latency": costs},
    )
