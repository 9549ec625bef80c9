"""`targets`, `doctor`, `groups` and `verify`: what a machine, a network and a bundle are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from passdeploy.cli.options import (
    Config,
    Debug,
    Exclude,
    FixedWidth,
    Json,
    MinWidth,
    Model,
    Tie,
    app,
    configuration,
    out_console,
    print_json,
    values,
)


@app.command()
def targets(json_: Json = False, debug: Debug = False) -> None:
    """Lists the named targets, which are attached, and which backend would be used.

    Example: `passdeploy targets`
    """
    from passdeploy.doctor import list_targets, render_targets

    rows = list_targets()
    if json_:
        print_json([vars(row) for row in rows])
    else:
        out_console.print(render_targets(rows))


@app.command()
def doctor(json_: Json = False, debug: Debug = False) -> None:
    """Says what this machine can do, and what is missing for the rest.

    Example: `passdeploy doctor`

    Exit status: 0 what a run needs is here and works, 1 something of it does not.
    """
    from passdeploy.doctor import diagnose, render, to_json

    findings = diagnose()
    if json_:
        print_json(to_json(findings))
    else:
        out_console.print(render(findings))
    raise typer.Exit(0 if to_json(findings)["ok"] else 1)


@app.command()
def groups(
    model: Model = None,
    data: Annotated[str | None, typer.Option(help="Gives the input size and the number of classes.")] = None,
    profile: Annotated[str | None, typer.Option(help="Latency profile, for each group's share of the latency.")] = None,
    exclude: Exclude = None,
    min_width: MinWidth = None,
    fixed_width: FixedWidth = None,
    tie: Tie = None,
    config: Config = None,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Shows which layers belong together: members, width, share of the MACs and of the latency of each group.

    Example: `passdeploy groups --model resnet20 --data fashion-mnist --min-width 'layer1.*=8'`
    """
    from passdeploy.config import groups_flags
    from passdeploy.summary import groups_table, groups_to_json, network_groups

    section = groups_flags(exclude, min_width, fixed_width, tie)
    flags = values(model=model, data=data, profile_file=profile, groups=section)
    made = configuration(config, flags, console=not json_, needs_data=False)
    subject = network_groups(made)
    if json_:
        print_json(groups_to_json(subject))
    else:
        out_console.print(groups_table(subject))


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(help="Folder of the bundle.")],
    key: Annotated[Path | None, typer.Option(help="Public key (PEM): an unsigned bundle is then refused.")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Measure the latency on this machine.")] = False,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Checks a bundle: digests, signature, hardware fit, sample outputs; with --measure the latency.

    Example: `passdeploy verify runs/demo/bundle --measure`

    Exit status: 0 verified (with --measure: and not over budget), 1 refused or over budget, 2 bad input, or what was
    asked for needs something that is missing here.
    """
    from passdeploy.shipping.verify import verify as checked  # needs neither torch nor pandas

    result = checked(bundle, key, measure)
    if json_:
        print_json(result.to_json())
    else:
        from rich.text import Text

        for check in result.checks:
            style = {"passed": "green", "refused": "bold red", "unavailable": "red"}.get(check.outcome, "dim")
            line = Text.assemble((f"{check.outcome:<8}", style), f" {check.name}: {check.message}")
            out_console.print(line, soft_wrap=True)  # a path that is cut is no path
    raise typer.Exit(result.exit_code)
