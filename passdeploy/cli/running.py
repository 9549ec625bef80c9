"""`run`, and the stages alone over an existing run directory."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from passdeploy.cli.options import (
    Backend,
    Batch,
    Config,
    Data,
    Debug,
    Epochs,
    Exclude,
    FixedWidth,
    Json,
    MinWidth,
    Model,
    Out,
    Precision,
    Target,
    Threads,
    Tie,
    Weights,
    app,
    configuration,
    out_console,
    print_json,
    values,
)


@app.command()
def run(
    model: Model = None,
    weights: Weights = None,
    data: Data = None,
    task: Annotated[str | None, typer.Option(help="classification or segmentation; default: the data's.")] = None,
    target: Target = None,
    latency: Annotated[
        str | None, typer.Option(help="A time (5ms, 800us) or a speed-up (2x); several: 2x,3x; or fastest.")
    ] = None,
    min_accuracy: Annotated[float | None, typer.Option(help="Least accuracy on the validation split (0.93).")] = None,
    backend: Backend = None,
    precision: Precision = None,
    batch: Batch = None,
    threads: Threads = None,
    percentile: Annotated[str | None, typer.Option(help="At which a time is judged: p50, p90 or p99.")] = None,
    method: Annotated[str | None, typer.Option(help="Method of the search: pass, sensitivity, mdp, l1, ...")] = None,
    epochs: Epochs = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random; default: 0.")] = None,
    profile: Annotated[str | None, typer.Option(help="Latency profile measured elsewhere.")] = None,
    exclude: Exclude = None,
    min_width: MinWidth = None,
    fixed_width: FixedWidth = None,
    tie: Tie = None,
    require_measured: Annotated[
        bool, typer.Option("--require-measured", help="Exit 1 if nothing was measured.")
    ] = False,
    config: Config = None,
    out: Out = Path("runs/latest"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete what earlier runs wrote into --out.")] = False,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Makes the network meet the latency: profile, search, fit, fine-tune, compile, measure, report, bundle.

    Example: `passdeploy run --model resnet20 --data fashion-mnist --target cpu --latency 2x --out runs/demo`

    The other way round: `--latency fastest --min-accuracy 0.93`.

    Exit status: 0 goal met or unverified, 1 goal not met, 2 bad input or too little memory, 70 internal error, 130
    or 143 interrupted (run again without --fresh to continue).
    """
    from passdeploy.api import refuse_macs
    from passdeploy.config import groups_flags
    from passdeploy.console import Ui
    from passdeploy.pipeline import Run

    flags = values(
        model=model,
        weights=weights,
        data=data,
        task=task,
        target=target,
        latency=latency,
        min_accuracy=min_accuracy,
        backend=backend,
        precision=precision,
        batch=batch,
        threads=threads,
        percentile=percentile,
        method=method,
        epochs=epochs,
        seed=seed,
        profile_file=profile,
        groups=groups_flags(exclude, min_width, fixed_width, tie),
        require_measured=True if require_measured else None,
    )
    made = configuration(config, flags, console=not json_)
    refuse_macs(made)
    running = Run(made, out, Ui(quiet=json_), fresh=fresh, command=_typed())
    reports = running.run()
    if json_:
        print_json([report.to_json() for report in reports] if len(reports) > 1 else reports[0].to_json())
    else:
        from passdeploy.summary import offered, render

        for budget, report in zip(running.answers, reports, strict=True):
            out_console.print(render(report))
            for path in offered(budget.space.root):  # not in the panel, which would cut them
                out_console.print(str(path), style="dim", markup=False, soft_wrap=True)
    raise typer.Exit(exit_code(reports, made.require_measured))


def exit_code(reports: list[Any], require_measured: bool) -> int:
    """The worst of the budgets: 0 met or unverified, 1 not met."""
    missed = any(not report.goal_met for report in reports)
    unmeasured = require_measured and any(report.status == "unverified" for report in reports)
    return int(missed or unmeasured)


def staged(name: str, out: Path, model: str | None, data: str | None, json_: bool, masked: bool = False) -> None:
    """Runs the stages up to `name` over an existing run directory."""
    from passdeploy.api import run_stage

    folders = run_stage(name, out, model=model, data=data, quiet=json_, masked=masked)
    if json_:
        print_json({"stage": name, "folders": [str(folder) for folder in folders]})
    else:
        for folder in folders:
            out_console.print(f"{name}: {folder}", markup=False, soft_wrap=True)


def _typed() -> str:
    """The command line; bytes that are no UTF-8 can't stand in a report."""
    return shlex.join(["passdeploy", *sys.argv[1:]]).encode("utf-8", "replace").decode()


def _stage_command(name: str, what: str) -> None:
    def command(
        out: Out,
        model: Model = None,
        data: Data = None,
        json_: Json = False,
        debug: Debug = False,
    ) -> None:
        staged(name, out, model, data, json_)

    command.__doc__ = (
        f"{what}\n\nExample: `passdeploy {name} --out runs/demo` (needs `config.yaml` there, as `run` writes it)"
    )
    app.command(name)(command)


for _name, _what in (
    ("search", "Searches: trains the prompt, the hypernetwork and the weights under the budget."),
    ("fit", "Closes the loop: allocates, measures, and repeats until the engine is just inside the budget."),
    ("finetune", "Rebuilds the network thin and trains its weights and prompt."),
):
    _stage_command(_name, _what)


@app.command("compile")
def compile_(
    out: Out,
    masked: Annotated[
        bool, typer.Option("--masked", help="Compile the masked network, too, and time it beside dense and thin.")
    ] = False,
    model: Model = None,
    data: Data = None,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Exports and compiles the thin network, and proves that it computes the same function.

    Example: `passdeploy compile --out runs/demo` (needs `config.yaml` there, as `run` writes it)
    """
    staged("compile", out, model, data, json_, masked)
