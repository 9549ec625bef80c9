"""`compare` and `study`: many runs that answer one question."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from passdeploy.cli.options import (
    Config,
    Data,
    Debug,
    Epochs,
    Json,
    Model,
    Out,
    SearchEpochs,
    Target,
    Weights,
    app,
    configuration,
    out_console,
    print_json,
    values,
)


def searching(epochs: float | None) -> dict[str, Any]:
    """The flag as configuration."""
    return {} if epochs is None else {"search": {"epochs": epochs}}


@app.command()
def compare(
    methods: Annotated[str, typer.Option(help="Separated by commas, or all.")] = "pass,pass-paper,l1,mdp",
    latency: Annotated[str | None, typer.Option(help="Budgets: 2x,3x.")] = None,
    seeds: Annotated[str, typer.Option(help="Separated by commas.")] = "0",
    axis: Annotated[
        str | None, typer.Option(help="Budgets are of latency (measured) or of macs (as in papers).")
    ] = None,
    split: Annotated[str, typer.Option(help="Whose accuracies are shown: validation (to choose by) or test.")] = "test",
    model: Model = None,
    weights: Weights = None,
    data: Data = None,
    target: Target = None,
    epochs: Epochs = None,
    search_epochs: SearchEpochs = None,
    gpus: Annotated[
        str | None, typer.Option(help="Runs go side by side, each on one of these GPUs: 0,1 or all.")
    ] = None,
    config: Config = None,
    out: Out = Path("runs/compare"),
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Runs several methods through the same closed loop, budgets, seeds and number of training steps.

    Example: `passdeploy compare --methods pass,l1,mdp --latency 2x,3x --seeds 0,1,2 --out runs/compare`

    Started again it goes on where it was. Exit status: 0 all ran, 1 some failed, 2 bad input.
    """
    from passdeploy.compare.command import compare as run_comparison
    from passdeploy.compare.page import summary
    from passdeploy.compare.table import render as tables
    from passdeploy.console import Ui

    flags = values(model=model, weights=weights, data=data, target=target, latency=latency, epochs=epochs, axis=axis)
    flags |= searching(search_epochs)
    made = configuration(config, flags, console=not json_)
    outcome = run_comparison(made, methods, seeds, out, split=split, ui=Ui(quiet=json_), gpus=gpus)
    if json_:
        rows = [row.to_json() for row in outcome.rows]
        print_json({"rows": rows, **summary(outcome.rows, split, failed=outcome.failed)})
    else:
        out_console.print(tables(outcome.rows, split))
        out_console.print(f"\n{out / 'compare.html'}", markup=False, soft_wrap=True)
    raise typer.Exit(1 if outcome.failed else 0)


@app.command()
def study(
    name: Annotated[str, typer.Argument(help="ablation, prompts, transfer, prompt-content, markov or vit.")],
    latency: Annotated[str | None, typer.Option(help="Budgets: 2x,3x.")] = None,
    seeds: Annotated[str, typer.Option(help="Separated by commas.")] = "0",
    model: Model = None,
    data: Data = None,
    to: Annotated[str | None, typer.Option(help="The second data set (transfer only).")] = None,
    target: Target = None,
    epochs: Epochs = None,
    search_epochs: SearchEpochs = None,
    config: Config = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder (default: runs/study-NAME).")] = None,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Asks one question about the method, runs what answers it, and writes a page with numbers and a conclusion.

    Example: `passdeploy study ablation --seeds 0,1,2 --out runs/study-ablation`

    Started again it goes on where it was. Exit status: 0 all ran, 1 some failed, 2 bad input.
    """
    from passdeploy.config import DEFAULT_FILE, merge
    from passdeploy.console import Ui
    from passdeploy.study.base import get_study
    from passdeploy.study.command import SMALL
    from passdeploy.study.command import study as run_study

    get_study(name)
    flags = values(model=model, data=data, target=target, latency=latency, epochs=epochs) | searching(search_epochs)
    configured = config is not None or Path(DEFAULT_FILE).is_file()
    made = configuration(config, flags if configured else merge(SMALL, flags), console=not json_)
    folder, typed = out or Path("runs") / f"study-{name}", shlex.join(["passdeploy", *sys.argv[1:]])
    findings, page = run_study(name, made, seeds, folder, to=to, ui=Ui(quiet=json_), command=typed)
    if json_:
        found = {"study": name, "page": str(page), "conclusion": findings.conclusion, "failed": findings.failed}
        print_json(found | findings.numbers)
    else:
        for sentence in findings.conclusion:
            out_console.print(f"- {sentence}", markup=False)
        out_console.print(str(page), markup=False, soft_wrap=True)
    raise typer.Exit(1 if findings.failed else 0)
