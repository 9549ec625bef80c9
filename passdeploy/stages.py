"""What each stage computes. Every function writes into the folder it is given and reads finished stages only."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from passdeploy.budget import Budget
from passdeploy.data.base import Split
from passdeploy.engines.base import CompileInput, Engine, get_backend
from passdeploy.engines.files import load_engine
from passdeploy.export import INPUT, OUTPUT, OnnxSlicer, export_onnx, onnx_function
from passdeploy.groups import Masker, as_masks, macs
from passdeploy.latency.cache import ProfileCache
from passdeploy.latency.log import MeasurementLog
from passdeploy.latency.loop import close_gap, close_loop, meets
from passdeploy.latency.macs import SCHEMA as MACS
from passdeploy.latency.macs import MacsModel
from passdeploy.latency.measure import BENCH, Settings
from passdeploy.latency.model import LatencyModel
from passdeploy.latency.profile import profile
from passdeploy.latency.roofline import Roofline
from passdeploy.latency.steps import steps_of
from passdeploy.meter import Meter, compare_engines, open_runner
from passdeploy.reporting import write_reports
from passdeploy.search.allocator import ALLOCATORS, LatencyAllocator, width_grids
from passdeploy.search.method import SearchContext, SearchResult, get_method
from passdeploy.search.prompt import InputStage, Prompted
from passdeploy.structure import Structure
from passdeploy.subject import Subject
from passdeploy.surgery import apply_architecture, architecture, relative_difference, thin
from passdeploy.tasks import Task
from passdeploy.training import Checkpoint, TrainSettings, evaluate, judge, reestimate_batch_norm, train
from passdeploy.weights import save_weights
from passdeploy.workspace import read_json, write_json

if TYPE_CHECKING:
    from passdeploy.pipeline import BudgetRun, Run

TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1, "int8": 3e-1, "fp8": 3e-1}
"""Largest max|a-b| / max|a| between the ONNX file and the engine of a precision; all other proofs are in fp32."""
TOP1_AGREEMENT = 0.99
MARGIN = 1.02
"""The loop accepts what is this much inside the budget, so that the engine that ships is inside it too."""
LOADS = 3
"""Where buffers happen to lie moves an engine's latency by up to 2 %: the load in the middle of these is reported."""
MOST_FITS = 12
"""Structures that the closed loop measures at most."""
MOST_GAP_FITS = 6
"""As many again, at most, to find one between what is far too fast and what is too slow."""


ROOFLINE = "passdeploy.roofline/1"
Predictor: TypeAlias = "LatencyModel | Roofline | MacsModel"


def plain(run: Run, network: nn.Module) -> Prompted:
    """A network behind its normalisation, without a prompt."""
    return Prompted(InputStage(run.subject.data.preprocess), network)


def _accuracy(model: nn.Module, subject: Subject) -> dict[str, float]:
    """The task's metric on the validation split and on the test set."""
    data, task = subject.data, subject.task
    return {"validation": evaluate(model, data.val, task=task), "test": evaluate(model, data.test, task=task)}


def run_dense(run: Run, folder: Path) -> None:
    """Trains the dense network when no weights were given, and records what it is worth."""
    subject, config = run.subject, run.config
    model = plain(run, subject.network)
    curve: dict[str, Any] | None = None
    if subject.weights is None:
        settings = TrainSettings(
            epochs=config.dense_epochs(),
            batch=config.train_batch,
            lr=config.dense.lr,
            seed=config.seed,
            min_steps=config.dense.min_steps,
        )
        curve = vars(
            train(model, subject.data, settings, checkpoint=Checkpoint(folder / "train.ckpt"), progress=run.ui.step)
        )
    save_weights(model.network, folder / "dense.safetensors")
    write_json(
        folder / "dense.json",
        {
            "model": subject.name,
            "weights": subject.weights or f"trained here on {subject.data.name}",
            "accuracy": _accuracy(model, subject),
            "macs": float(macs(subject.operators)),
            "params": sum(p.numel() for p in model.network.parameters()),
            "curve": curve,
        },
    )


def slicer(run: Run) -> OnnxSlicer:
    """Thin ONNX files of the dense network, for measuring."""
    model = plain(run, run.subject.with_state(run.dense_state()))
    return OnnxSlicer(model, run.subject.groups, run.subject.data.input_shape, run.target.batch)


def meter(run: Run) -> Meter:
    """Times structures of the dense network on the target."""
    return Meter(run.slicer, run.subject.groups, run.target, run.validation_images, run.config.scope)


def stage_model(run: Run) -> Predictor:
    """The latency model of a finished profile stage."""
    facts = read_json(run.space.folder("profile") / "profile.json")
    if facts["schema"] == ROOFLINE:
        return roofline(run)
    if facts["schema"] == MACS:
        return MacsModel(run.subject.operators, list(run.subject.groups.units.values()))
    kind = "measured" if run.config.profile_file is None else "profile"
    return LatencyModel.from_json(facts, run.subject.operators, list(run.subject.groups.units.values()), kind)


def roofline(run: Run) -> Roofline:
    """The analytic model of a target that nothing can be measured on."""
    return Roofline(run.subject.operators, list(run.subject.groups.units.values()), run.target)


def run_profile(run: Run, folder: Path) -> None:
    """Fits the latency model: on measured engines, from a file, or, where nothing can be measured, the roofline."""
    config, subject = run.config, run.subject
    units = list(subject.groups.units.values())
    if config.axis == "macs":
        write_json(folder / "profile.json", {"schema": MACS})
    elif config.profile_file is not None:
        model = LatencyModel.load(Path(config.profile_file), subject.operators, units)
        write_json(folder / "profile.json", model.to_json())
    elif run.measured:
        # The seed is left out: any sample of structures will do.
        asked = config.profile.model_dump(exclude={"cache"})
        cache = ProfileCache(
            subject.operators, units, {"target": run.target_facts(), "scope": config.scope, "profile": asked}
        )
        known = cache.load() if config.profile.cache == "use" else None
        if known is not None:
            date = known.provenance.get("date", "another day")
            run.ui.say(f"Latency model: from this machine's cache, measured on {date}.")
        else:
            known = _measured_profile(run, folder)
            if config.profile.cache != "off":
                cache.store(known)
        write_json(folder / "profile.json", known.to_json())
    else:
        write_json(folder / "profile.json", {"schema": ROOFLINE, "target": run.target.name})


def _measured_profile(run: Run, folder: Path) -> LatencyModel:
    """Fits the latency model to engines of varied structures, measured on the target."""
    config, subject = run.config, run.subject
    with meter(run) as timed:
        if timed.slicer.reason:
            run.ui.say(f"Structures are exported one by one ({timed.slicer.reason}).")
        steps = steps_of(run.target)
        write_json(folder / "steps.json", steps.to_json())
        today = time.strftime("%Y-%m-%d", time.gmtime())
        return profile(
            timed.sample,
            subject.operators,
            subject.groups,
            budget_s=config.profile.seconds,
            seed=config.seed,
            log=MeasurementLog(folder / "measurements.jsonl"),
            target_key=run.target.name,
            steps=steps.candidates,
            most=config.profile.structures,
            bytes_per_weight={"fp32": 4, "int8": 1, "fp8": 1}.get(run.target.precision, 2),
            provenance={**run.target_facts(), "model": subject.name, "date": today},
            progress=lambda share: run.ui.step(round(100 * share), 100),
        )


def run_search(run: Run, folder: Path) -> None:
    """Scores every unit: PASS or a baseline."""
    predictor = stage_model(run)
    dense_ms = predictor.dense_ms
    ratios = tuple(min(1.0, budget.target_ratio(dense_ms)) for budget in run.budgets)
    context = SearchContext(
        network=run.subject.with_state(run.dense_state()),
        data=run.subject.data,
        groups=run.subject.groups,
        operators=run.subject.operators,
        predictor=predictor,
        step=predictor.step,
        ratios=ratios,
        config=run.config,
        checkpoint=Checkpoint(folder / "search.ckpt"),
        progress=run.ui.step,
    )
    if all(ratio >= 1 for ratio in ratios):
        run.ui.say(f"The dense engine is already inside the budget ({dense_ms:.4g} ms): nothing is pruned.")
        uniform = {name: torch.ones(units, dtype=torch.float64) for name, units in run.subject.groups.units.items()}
        result = SearchResult([uniform] * len(ratios), "uniform", run.dense_state())
    else:
        result = get_method(run.config.method)(context)
    result.save(folder)


def _stage(run: Run, state: dict[str, Tensor]) -> InputStage:
    """The input stage with the learnt prompt, if there is one."""
    prompt = run.config.prompt
    stage = InputStage(run.subject.data.preprocess, prompt.kind if state else "none", prompt.width)
    stage.load_state_dict(state)
    return stage


@dataclass(frozen=True)
class _Timed:
    """A logged comparison of a structure with the dense engine, as the loop reads it."""

    speedup: float
    low: float
    thin_ms: float | None
    dense_ms: float | None


def bench_settings(budget: Budget) -> Settings:
    """Long enough to say something about the budget's percentile."""
    return dataclasses.replace(BENCH, percentiles=(50.0, float(budget.percentile[1:])))


Allocated = tuple[Structure, float]


def _fit_measured(
    run: Run,
    budget: BudgetRun,
    folder: Path,
    facts: dict[str, Any],
    allocate: Callable[[float], Allocated | None],
    fastest: Callable[[], Allocated],
    narrow: Callable[[Structure, float], Allocated | None],
    dense_ms: float,
) -> tuple[Structure, str, dict[str, Any]]:
    """The closed loop on measured engines: the structure, the status, and what it reaches."""
    asked, groups = budget.budget, run.subject.groups
    log = MeasurementLog(folder / "measurements.jsonl")
    with meter(run) as timed:

        def measure(structure: Structure) -> _Timed:
            def take() -> dict[str, Any]:
                comparison = timed.compare(structure, bench_settings(asked))
                ratio, engines = comparison.ratio("thin"), comparison.measurements
                at = {name: engines[name].at(float(asked.percentile[1:])) for name in engines}
                return {"speedup": ratio.value, "low": ratio.low, "thin_ms": at["thin"], "dense_ms": at["dense"]}

            value = log.measure("fit", structure.digest(), run.target.name, take).value
            run.ui.step(len(log.records), MOST_FITS, f"{value['speedup']:.3f}x")
            return _Timed(**value)

        if asked.speedup == 1:
            return groups.dense(), "dense_inside", {"latency_ms": dense_ms, "speedup": 1.0, "measured": True}
        if asked.latency_ms is not None:
            # In time, only a measurement tells whether there is anything to do, and how far away the budget is.
            dense = measure(groups.dense())
            dense_ms = dense.dense_ms or dense_ms
            if meets(asked, dense):
                return groups.dense(), "dense_inside", {"latency_ms": dense_ms, "speedup": 1.0, "measured": True}
        found = close_loop(allocate, fastest, measure, asked, dense_ms, MOST_FITS, MARGIN)
        found = close_gap(found, narrow, measure, asked, dense_ms, MOST_GAP_FITS, MARGIN)
    chosen = found.chosen
    facts["candidates"] = [
        {
            "asked_ms": candidate.asked_ms,
            "predicted_ratio": candidate.predicted_ms / dense_ms,
            "measured_ratio": 1 / candidate.timing.speedup,
            "chosen": candidate is chosen,
        }
        for candidate in found.candidates
    ]
    if found.plateau:
        facts["messages"].append(
            "Latency is a staircase: no structure was found between the chosen one and the budget, "
            "so it is faster than asked."
        )
    reached = {"latency_ms": chosen.timing.thin_ms, "speedup": chosen.timing.speedup, "measured": True}
    return chosen.structure, "within_budget" if found.feasible else "infeasible", reached


def run_fit(run: Run, budget: BudgetRun, folder: Path) -> None:
    """Re-allocates from the same scores until the measured engine is just inside the budget, and proves the masks."""
    result = SearchResult.load(run.space.folder("search"))
    predictor = stage_model(run)
    groups, asked = run.subject.groups, budget.budget
    grids = width_grids(groups, predictor.step, run.config.search.keep_at_least, result.depth)
    allocator = ALLOCATORS[result.allocator](groups, predictor, grids)
    importance = result.importance_arrays(budget.index)
    facts: dict[str, Any] = {"messages": [], "candidates": [], "reachable": None, "masked_vs_thin": None}
    dense_ms = predictor.dense_ms

    def allocate(target_ms: float) -> tuple[Structure, float] | None:
        found = allocator.solve(importance, target_ms)
        return None if found is None else (found.structure, found.predicted_ms)

    def fastest() -> tuple[Structure, float]:
        widths = allocator.fastest()
        return allocator.structure(importance, widths), float(allocator.predict(widths[None])[0])

    def narrow(slower: Structure, target_ms: float) -> tuple[Structure, float] | None:
        if not isinstance(allocator, LatencyAllocator):
            return None
        found = allocator.narrow(importance, target_ms, _widths(run, slower))
        return None if found is None else (found.structure, found.predicted_ms)

    closed = run.measured and run.config.axis == "latency"
    if closed:
        structure, status, reached = _fit_measured(run, budget, folder, facts, allocate, fastest, narrow, dense_ms)
    elif asked.target_ratio(dense_ms) >= 1:
        structure, status = groups.dense(), "dense_inside"
        reached = {"latency_ms": dense_ms, "speedup": 1.0, "measured": False}
    else:
        allocated = allocate(asked.target_ms(dense_ms))
        status = "within_budget" if allocated is not None else "infeasible"
        structure, predicted = allocated or fastest()
        reached = {"latency_ms": predicted, "speedup": dense_ms / predicted, "measured": False}
    if status == "infeasible":
        how = "measured" if closed else "predicted"
        unit = "ms" if run.config.axis == "latency" else "MACs"
        facts["reachable"] = reached
        facts["messages"].append(
            f"No structure reaches {asked.asked}: the fastest is {how} at {reached['latency_ms']:.4g} {unit} "
            f"({reached['speedup']:.2f}x)."
        )
    if status == "dense_inside":
        facts["messages"].append(
            f"The dense engine is already inside the budget of {asked.asked}: it is shipped as it is."
        )
    state = run.subject.with_state(result.network)
    facts["masked_vs_thin"] = prove_masked(run, Prompted(_stage(run, result.stage), state), structure)
    write_json(folder / "structure.json", groups.canonical(structure).to_json())
    write_json(folder / "fit.json", facts | {"status": status})


def _fit_structure(folder: Path) -> Structure:
    return Structure.load(folder / "structure.json")


@torch.no_grad()
def prove_masked(run: Run, model: Prompted, structure: Structure) -> float:
    """Relative difference between the masked network and the thin one, on real images, in eval mode."""
    images = torch.from_numpy(run.validation_images)
    model = model.cpu().float().eval()
    groups = run.subject.groups
    masked = Masker(model, groups, "network.")(as_masks(groups.canonical(structure).masks), images)
    small = Prompted(model.stage, thin(model.network, groups, structure).eval())
    return relative_difference(masked, small(images))


def run_finetune(run: Run, budget: BudgetRun, folder: Path) -> None:
    """Rebuilds the network thin, re-estimates its batch norms and trains weights and prompt."""
    subject, config = run.subject, run.config
    fitted = budget.space.folder("fit")
    facts, structure = read_json(fitted / "fit.json"), _fit_structure(fitted)
    result = SearchResult.load(run.space.folder("search"))
    arch = architecture(subject.groups, structure)
    write_json(folder / "architecture.json", arch)
    untouched = facts["status"] == "dense_inside"
    state = run.dense_state() if untouched else result.network
    network = apply_architecture(subject.with_state(state), arch)
    model = Prompted(_stage(run, {} if untouched else result.stage), network)
    curve, before = None, None
    if not untouched:
        reestimate_batch_norm(model, subject.data, seed=config.seed)
        before = evaluate(model, subject.data.val, task=subject.task)
        settings = TrainSettings(
            epochs=config.finetune_epochs(),
            batch=config.train_batch,
            lr=config.finetune.lr,
            weight_decay=config.finetune.weight_decay,
            distill=config.finetune.distill,
            seed=config.seed + 2,
            min_steps=config.finetune.min_steps,
            extra_steps=result.unspent_steps,
        )
        teacher = plain(run, subject.with_state(run.dense_state()))
        checkpoint = Checkpoint(folder / "finetune.ckpt")
        curve = vars(train(model, subject.data, settings, teacher=teacher, checkpoint=checkpoint, progress=run.ui.step))
    model = model.cpu().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    save_weights(model.network, folder / "model.safetensors")
    if untouched:
        accuracy = read_json(run.space.folder("dense") / "dense.json")["accuracy"]
    else:
        accuracy = _accuracy(model, subject)
    without = None
    if model.stage.prompt is not None:
        save_file({"prompt": model.stage.prompt.detach().contiguous()}, folder / "prompt.safetensors")
        without = evaluate(plain(run, model.network), subject.data.val, task=subject.task)
    write_json(
        folder / "finetune.json",
        {
            "accuracy": accuracy,
            "accuracy_before": before,
            "accuracy_without_prompt": without,
            "curve": curve,
            "macs": float(macs(subject.operators, _widths(run, structure))),
            "params": sum(p.numel() for p in model.network.parameters()),
        },
    )


def _widths(run: Run, structure: Structure) -> np.ndarray:
    widths = run.subject.groups.canonical(structure).widths()
    return np.array([widths[name] for name in run.subject.groups.names])


def thin_model(run: Run, budget: BudgetRun) -> Prompted:
    """The fine-tuned thin network with its prompt."""
    folder = budget.space.folder("finetune")
    network = apply_architecture(run.subject.build(), read_json(folder / "architecture.json"))
    network.load_state_dict(load_file(folder / "model.safetensors"))
    prompt = folder / "prompt.safetensors"
    stage = _stage(run, load_file(prompt) if prompt.exists() else {})
    return Prompted(stage, network).eval()


def _in_batches(call: Any, images: np.ndarray, batch: int) -> np.ndarray:
    return np.concatenate([call(images[i : i + batch]) for i in range(0, len(images), batch)])


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    return relative_difference(torch.from_numpy(np.asarray(a)), torch.from_numpy(np.asarray(b)))


def run_compile(run: Run, budget: BudgetRun, folder: Path) -> None:
    """Exports and compiles the thin and the dense network; proves thin == ONNX == engine."""
    target, images = run.target, run.validation_images
    images = images[: len(images) // target.batch * target.batch]
    shape = run.subject.data.input_shape
    backend = get_backend(target.backend)
    model = thin_model(run, budget)
    dense = plain(run, run.subject.with_state(run.dense_state()))
    engines: dict[str, Engine] = {}
    for done, (name, network) in enumerate({"model": model, "dense": dense}.items()):
        run.ui.step(done, 2, f"exporting and compiling {name}")
        path = export_onnx(network, folder / f"{name}.onnx", shape, target.batch)
        example = torch.from_numpy(images[: target.batch])
        program = (
            torch.export.export(network, (example,))
            if "inductor" in target.backend or "torch" in target.backend
            else None
        )
        engines[name] = backend.compile(CompileInput(onnx=path, exported_program=program, samples=images), target)
    backend.save(engines["model"], folder / "engine")
    backend.save(engines["dense"], folder / "dense-engine")
    with torch.no_grad():
        expected = model(torch.from_numpy(images)).numpy()
    data = (folder / "model.onnx").read_bytes()
    from_onnx = _in_batches(onnx_function(data), images, target.batch)
    proof: dict[str, Any] = {
        "masked_vs_thin": read_json(budget.space.folder("fit") / "fit.json")["masked_vs_thin"],
        "thin_vs_onnx": _difference(expected, from_onnx),
        "onnx_vs_engine": None,
        "top1_agreement": None,
        "tolerance": TOLERANCE[target.precision],
        "images": len(images),
    }
    if run.measured:
        with open_runner(load_engine(folder / "engine"), target, images[: target.batch]) as runner:
            from_engine = _in_batches(lambda part: runner.run({INPUT: part})[OUTPUT], images, target.batch)
        proof["onnx_vs_engine"] = _difference(from_onnx, from_engine)
        agreement = run.subject.task.agreement(torch.from_numpy(from_onnx), torch.from_numpy(from_engine))
        proof["top1_agreement"] = agreement
    write_json(folder / "accuracy.json", _shipped_accuracy(run, folder, engines, images))
    write_json(folder / "proof.json", proof | {"ok": proof_holds(proof)})


def exact(difference: float | None) -> bool:
    """Whether a step in fp32 is within its bound."""
    return difference is None or difference <= TOLERANCE["fp32"]


def accuracy_of(call: Callable[[np.ndarray], np.ndarray], split: Split, batch: int, task: Task | None = None) -> float:
    """The task's metric of a function of (batch, 3, H, W) arrays; the last, short batch is filled up."""

    def filled(images: Tensor) -> Tensor:
        array = images.numpy()
        if len(array) < batch:
            array = np.concatenate([array, np.repeat(array[:1], batch - len(array), axis=0)])
        return torch.from_numpy(np.asarray(call(array)[: len(images)]))

    return judge(filled, split, batch, task)


def _shipped_accuracy(run: Run, folder: Path, engines: dict[str, Engine], images: np.ndarray) -> dict[str, Any] | None:
    """Accuracy in the target's precision; None in fp32, where the network's own holds (it is proven to be the same).

    Measured on the engine, or, where that can't run, on the graph that it is built from.
    """
    target, data, task = run.target, run.subject.data, run.subject.task
    if target.precision == "fp32":
        return None
    backend = get_backend(target.backend)
    found: dict[str, Any] = {}
    for done, name in enumerate(("dense", "model")):
        run.ui.step(done, 2, f"accuracy in {target.precision}")
        if run.measured:
            with open_runner(engines[name], target, images[: target.batch]) as runner:
                found[name] = accuracy_of(lambda part: runner.run({INPUT: part})[OUTPUT], data.test, target.batch, task)
            continue
        graph = backend.graph_for(CompileInput(onnx=folder / f"{name}.onnx", samples=images), target)
        if graph is None:
            return None
        found[name] = accuracy_of(onnx_function(graph), data.test, target.batch, task)
    return found | {"of": "engine" if run.measured else "graph"}


def proof_holds(proof: dict[str, Any]) -> bool:
    """Whether every step that was checked is within its bound."""
    in_fp32 = exact(proof["masked_vs_thin"]) and exact(proof["thin_vs_onnx"])
    engine = proof["onnx_vs_engine"] is None or proof["onnx_vs_engine"] <= proof["tolerance"]
    agree = proof["top1_agreement"] is None or proof["top1_agreement"] >= TOP1_AGREEMENT
    return in_fp32 and engine and agree


def run_bench(run: Run, budget: BudgetRun, folder: Path) -> None:
    """Times the very engine file that ships against the dense engine, interleaved."""
    if not run.measured:
        write_json(folder / "bench.json", {"measured": False})
        return
    compiled = budget.space.folder("compile")
    engines = {"dense": load_engine(compiled / "dense-engine"), "thin": load_engine(compiled / "engine")}
    log = MeasurementLog(folder / "measurements.jsonl")

    def take() -> dict[str, Any]:
        images = run.validation_images[: run.target.batch]
        loads = []
        for done in range(LOADS):
            run.ui.step(done, LOADS)
            loads.append(compare_engines(engines, run.target, images, run.config.scope, bench_settings(budget.budget)))
        loads.sort(key=lambda comparison: comparison.ratio("thin").value)
        comparison = loads[LOADS // 2]
        return {
            "loads": [comparison.ratio("thin").value for comparison in loads],
            "ratio": comparison.ratio("thin").to_json(),
            **{name: m.to_json(samples=True) for name, m in comparison.measurements.items()},
        }

    record = log.measure("bench", _fit_structure(budget.space.folder("fit")).digest(), run.target.name, take)
    write_json(folder / "bench.json", {"measured": True, **record.value})
    logs = [run.space.folder("profile"), budget.space.folder("fit"), folder]
    everything = folder / "everything.tmp"
    everything.write_text("".join(p.read_text() for p in (f / "measurements.jsonl" for f in logs) if p.exists()))
    MeasurementLog(everything).write_csv(folder / "measurements.csv")


def run_report(run: Run, budget: BudgetRun, folder: Path) -> None:
    """Writes report.json, report.md and report.html."""
    from passdeploy.assemble import assemble

    write_reports(assemble(run, budget), folder)


def run_ship(run: Run, budget: BudgetRun, folder: Path) -> None:
    """Writes the sealed bundle around the engine that was measured."""
    from passdeploy.shipping.bundle import BundleSource, EngineSource, write_bundle

    compiled, tuned = budget.space.folder("compile"), budget.space.folder("finetune")
    images = run.validation_images[:8]
    data = run.subject.data
    prompt = tuned / "prompt.safetensors"
    report = read_json(budget.space.folder("report") / "report.json")
    source = BundleSource(
        name=f"{run.subject.name}-{data.name}-{run.target.name}-{budget.budget.asked}",
        model=run.subject.name,
        data=data.name,
        classes=data.classes,
        preprocess=data.preprocess,
        onnx=compiled / "model.onnx",
        # A speed-up can only be judged again, where the bundle arrives, beside the dense graph.
        dense_onnx=compiled / "dense.onnx" if budget.budget.speedup is not None else None,
        engines=[EngineSource(compiled / "engine", run.target)],
        images=images,
        report=report,
        data_licence=data.licence,
        config=run.space.root / "config.yaml",
        structure=budget.space.folder("fit") / "structure.json",
        architecture=tuned / "architecture.json",
        weights=tuned / "model.safetensors",
        prompt=prompt if prompt.exists() else None,
    )
    shutil.rmtree(folder / "bundle", ignore_errors=True)
    write_bundle(folder / "bundle", source)
