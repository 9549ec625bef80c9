"""`profile` and `bench`: what measures without running a search."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from passdeploy.cli.options import (
    Backend,
    Batch,
    Config,
    Data,
    Debug,
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
from passdeploy.errors import BadInput


@app.command()
def profile(
    save: Annotated[Path, typer.Option("--save", help="Where the latency profile is written.")],
    model: Model = None,
    weights: Weights = None,
    data: Data = None,
    target: Target = None,
    backend: Backend = None,
    precision: Precision = None,
    batch: Batch = None,
    threads: Threads = None,
    exclude: Exclude = None,
    min_width: MinWidth = None,
    fixed_width: FixedWidth = None,
    tie: Tie = None,
    config: Config = None,
    out: Out = Path("runs/profile"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete what --out has, and measure again.")] = False,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Measures structures on the target and writes the latency model as a portable file; nothing is trained for it.

    Example: `passdeploy profile --model resnet20 --data fashion-mnist --target cpu --save cpu.profile.json`, and on the
    machine that searches: `passdeploy run ... --profile cpu.profile.json`
    """
    from passdeploy.api import save_profile
    from passdeploy.config import groups_flags

    flags = values(
        model=model,
        weights=weights,
        data=data,
        target=target,
        backend=backend,
        precision=precision,
        batch=batch,
        threads=threads,
        groups=groups_flags(exclude, min_width, fixed_width, tie),
    )
    made = configuration(config, flags, console=not json_)
    if made.axis == "macs":
        raise BadInput("axis macs: passdeploy profile measures latencies; leave axis out")
    facts = save_profile(made, out, save, fresh=fresh, quiet=json_)
    if json_:
        print_json(facts)
    else:
        repeats = facts["repeatability"]
        within = "" if repeats is None else f"; a measurement repeats within {repeats:.1%}"
        out_console.print(
            f"{save}: {facts['n']} structures, mean error {facts['mape']:.1%}, largest {facts['max_ape']:.1%} "
            f"(cross-validated{within})",
            markup=False,
            soft_wrap=True,
        )


@app.command()
def bench(
    engines: Annotated[list[str], typer.Argument(help="Engines, ONNX files, run directories or bundles.")],
    target: Annotated[str, typer.Option(help="Where they run.")] = "cpu",
    backend: Annotated[
        str | None,
        typer.Option(help="Compiles ONNX files; default: that of the first engine given, else the target's."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads, for ONNX files; default: those of the first engine given, else 1.")
    ] = None,
    fail_if_slower: Annotated[
        str | None, typer.Option(help="Exit 1 if one is slower than the first by more than this: 5% (2% at least).")
    ] = None,
    layers: Annotated[
        bool, typer.Option("--layers", help="Show what each layer takes, by the runtime's profiler.")
    ] = False,
    against: Annotated[
        Path | None, typer.Option(help="An earlier report.json: compare its speed-up with that of the two given.")
    ] = None,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Times engines side by side, interleaved; the first is the reference.

    Example: `passdeploy bench runs/demo/dense.onnx runs/demo --fail-if-slower 5%`

    Exit status with --fail-if-slower, or --against (5 % where no margin is given): 0 not slower, 1 slower, 3
    inconclusive.
    """
    from passdeploy import bench_outcome, benching
    from passdeploy.console import Ui
    from passdeploy.latency.measure import BENCH, interleave
    from passdeploy.summary import bench_table, layer_table

    margin = bench_outcome.parse_margin(fail_if_slower or "5%")
    bench_outcome.check_judged(engines, fail_if_slower, against)
    with benching.opened(engines, target, backend, threads, against) as runners:
        parts = benching.layers(runners) if layers else None
        comparison = interleave(runners, progress=benching.announced(Ui(quiet=json_), BENCH.pairs))
    code: int | None = None
    said = None
    if against is not None:
        code, said = bench_outcome.against_report(comparison, against, margin)
    elif fail_if_slower is not None:
        code = bench_outcome.outcome(comparison, margin)
    if json_:
        told = {} if parts is None else {"layers": [vars(part) for part in parts]}
        print_json(benching.to_json(comparison, runners.made) | told | {"outcome": code, "message": said})
    else:
        if parts is not None:
            out_console.print(layer_table(list(runners), parts))
        out_console.print(bench_table(comparison))
        for label, made in runners.made.items():
            out_console.print(f"{label}: {made}", style="dim", markup=False, soft_wrap=True)
        if said:
            out_console.print(said, markup=False)
    raise typer.Exit(code or 0)
