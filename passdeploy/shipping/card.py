"""The model card and the few lines of help inside a bundle, for people."""

from __future__ import annotations

import re

from passdeploy.huge_pages import ASK
from passdeploy.shipping.manifest import BundleManifest, EngineEntry, Latency

MODEL_CARD = "MODEL_CARD.md"
README = "README.txt"

_STATUS = {
    "within_budget": "the compiled engine was measured on the target and meets the budget",
    "over_budget": "the compiled engine was measured on the target and misses the budget",
    "infeasible": "no structure of this network meets the budget on the target",
    "unverified": "its engine could not be run where it was made: nothing was measured, no latency is claimed",
    "not_equivalent": "a step does not compute the same function as the one before it: do not use",
    "accuracy_below_floor": "the accuracy is below the floor that was asked for",
}


_FILES = """Image files, where it was trained on a folder of them: the EXIF orientation was applied, alpha
dropped, grey repeated, resizing was bilinear with antialiasing (Pillow's), and pixels were rounded to 8 bits
before they were divided by 255."""


def _cell(text: str) -> str:
    """Text that can't break out of its table cell or become markup."""
    return re.sub(r"([\\|`*_<>\[\]])", r"\\\1", " ".join(text.split()))


def _percent(value: float | None) -> str:
    return "unknown" if value is None else f"{100 * value:.2f} %"


def _ms(latency: Latency | None) -> str:
    if latency is None:
        return "not measured"
    parts = [
        f"{name} {value:.3f} ms" for name in ("p50", "p90", "p99") if (value := getattr(latency, name)) is not None
    ]
    return ", ".join(parts) or "too few samples"


def _engine_row(engine: EngineEntry) -> str:
    cells = (engine.target, engine.device, f"{engine.backend} {engine.backend_version}", engine.precision)
    rest = f"{engine.batch} | {engine.threads} | {_ms(engine.dense_latency_ms)} | {_ms(engine.latency_ms)}"
    return f"| {' | '.join(map(_cell, cells))} | {rest} |"


def _huge_pages(manifest: BundleManifest) -> str:
    if not any(engine.huge_pages for engine in manifest.engines):
        return ""
    return f"""Weights lay in huge pages while it was measured. Where Linux hands them out on request only
(/sys/kernel/mm/transparent_hugepage/enabled: madvise), start what serves it with `{ASK}`.
"""


def _shape(shape: tuple[int, ...]) -> str:
    return "(" + ", ".join("n" if size < 0 else str(size) for size in shape) + ")"


def _preprocess(manifest: BundleManifest) -> str:
    pre = manifest.preprocess
    height, width = pre.size
    if pre.resize is None:
        return f"resize to {height}x{width} (height x width)"
    return f"resize the shorter side to {pre.resize}, cut {height}x{width} (height x width) out of the centre"


def model_card(manifest: BundleManifest, *, signed: bool) -> str:
    """Markdown, after "Model Cards for Model Reporting" (arXiv 1810.03993)."""
    proofs = {n: value for n, value in manifest.equivalence.items() if value is not None and "_vs_" in n}
    engines = (
        "\n".join(_engine_row(engine) for engine in manifest.engines)
        or "| none: build one from model.onnx |" + " |" * 7
    )
    budget, what, metric = manifest.budget, "image", "top-1 accuracy"
    if len(manifest.output.shape) > 2:
        what, metric = "pixel", "mean intersection over union"
    asked = "none"
    if budget is not None:
        # A speed-up is that of medians, whatever the percentile.
        at = "" if budget.asked.lower().endswith("x") else f"{budget.percentile}, "
        asked = f"{_cell(budget.asked)} ({at}{budget.scope})"
    return f"""# {_cell(manifest.name)}

{_cell(manifest.model)}, made to meet a latency on real hardware by passdeploy {_cell(manifest.passdeploy_version)}.
Status: **{manifest.status}**: {_STATUS[manifest.status]}.

## What it is for
Classifies {what}s into {len(manifest.classes)} classes: {", ".join(_cell(c) for c in manifest.classes[:20])}{
        ", ..." if len(manifest.classes) > 20 else ""
    }.
It knows nothing else: any {what} gets one of these classes. It was trained and tested on {
        _cell(manifest.data)
    } (licence of
the data: {_cell(manifest.data_licence)}); on images of another kind its accuracy is unknown and has to be measured.

## How good it is
| | dense | shipped |
|---|---|---|
| {_cell(manifest.metric or metric)}, test data | {_percent(manifest.dense_accuracy)} | {_percent(manifest.accuracy)} |

No choice (early stopping, thresholds, structure) was made on the test data. Pruning can hurt some classes more than
others; the overall accuracy does not show that.

## How fast it is
Budget: {asked}.

| target | device | backend | precision | batch | threads | dense | shipped |
|---|---|---|---|---|---|---|---|
{engines}

A latency holds for the device it was measured on. `passdeploy verify BUNDLE --measure` measures on yours.
{_huge_pages(manifest)}
## What goes in and out
In: `{manifest.input.name}`, float32, {_shape(manifest.input.shape)}, RGB in [0, 1]: {_preprocess(manifest)}.
{_FILES}
Done by the engine itself: {" and ".join(manifest.preprocess.in_graph)}.
Out: `{manifest.output.name}`, float32, {
        _shape(manifest.output.shape)
    }: logits, in the order of the class names in bundle.json.

## How it was made
Method {_cell(manifest.method)}, seed {manifest.seed if manifest.seed is not None else "unknown"}, {manifest.created}.
Each step was compared with the one before it (max|a-b| / max|a|): {
        ", ".join(f"{_cell(n.replace('_', ' '))} {value:.1e}" for n, value in proofs.items()) or "not recorded"
    }.

## Integrity
{
        "Signed: `passdeploy verify BUNDLE --key PUBLIC_KEY` detects tampering."
        if signed
        else "Not signed: SHA256SUMS detects corruption, not tampering."
    }
"""


def readme(manifest: BundleManifest, *, signed: bool) -> str:
    """Plain text for whoever opens the folder."""
    key = " --key PUBLIC_KEY" if signed else ""
    shape = ", ".join(map(str, manifest.input.shape[1:]))
    return f"""{manifest.name}: a bundle written by passdeploy {manifest.passdeploy_version}

Check it:   passdeploy verify .{key}
            or, without passdeploy: sha256sum --check --strict SHA256SUMS
Run it:     from passdeploy.shipping.runner import load
            with load(".") as model:
                logits = model.run(images)   # float32 (n, {shape}), RGB in [0, 1]
Serve it:   passdeploy ship . --server triton --out ../models

MODEL_CARD.md says what it is for, bundle.json what is bound to what, sbom.cdx.json what it was made with.
"""
