"""`report` and `ship`: what a finished run hands over."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from passdeploy.cli.options import Data, Debug, Json, Model, app, out_console, print_json, write_result
from passdeploy.cli.running import staged


def _only_with(needed: str, given: dict[str, object]) -> None:
    """Refuses options that would be ignored."""
    for option, value in given.items():
        if value:
            raise typer.BadParameter(f"{option} goes with {needed}")


@app.command()
def report(
    runs: Annotated[
        list[Path] | None, typer.Argument(help="Run directories, folders of them, or report.json files.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Run directory to continue until it has its report.")
    ] = None,
    form: Annotated[
        str, typer.Option("--format", help="json, markdown, html, history, junit, github-action-benchmark.")
    ] = "markdown",
    trtexec: Annotated[
        list[Path] | None, typer.Option(help="A file of trtexec --exportTimes, shown beside the run's own times.")
    ] = None,
    model: Model = None,
    data: Data = None,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Prints the report of one run, or of several side by side, in a format for people or for CI.

    `history` is a page with the trend over commits and the best trade-offs. Fills $GITHUB_STEP_SUMMARY where it is
    set. With --out, and no run directories, it continues that run until it has its report.

    Example: `passdeploy report runs/demo --format junit > report.xml`
    """
    if not runs:
        if out is None:
            raise typer.BadParameter("give run directories, or --out DIR")
        _only_with("run directories", {"--trtexec": trtexec, "--format": form != "markdown"})
        staged("report", out, model, data, json_)
        return
    if out is not None:
        raise typer.BadParameter("--out finishes a run, run directories are printed; give one of the two")
    _only_with("--out", {"--model": model, "--data": data})
    if json_ and form not in ("json", "markdown"):
        raise typer.BadParameter(f"--json is --format json; leave it out for --format {form}")
    from passdeploy.reporting import load_report
    from passdeploy.reporting.exporters import export, write_step_summary
    from passdeploy.reporting.files import find_reports
    from passdeploy.reporting.trtexec import attach

    loaded = attach([load_report(path) for given in runs for path in find_reports(given)], trtexec or [])
    text = export(loaded, "json" if json_ else form)  # what can't be exported leaves the summary alone, too
    write_step_summary(loaded)
    write_result(text.rstrip("\n") + "\n")


@app.command()
def ship(
    source: Annotated[Path | None, typer.Argument(help="Bundle, or a run directory that has one.")] = None,
    server: Annotated[str | None, typer.Option(help="Write a model repository for triton, mlserver or kserve.")] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="With --server the model repository (default: models), else the run directory."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the model in the repository; default: the bundle's.")
    ] = None,
    kind: Annotated[
        str, typer.Option(help="What serves: auto, python, onnxruntime or tensorrt (Triton, KServe).")
    ] = "auto",
    instances: Annotated[int, typer.Option(help="Copies of the model per device (Triton, KServe).")] = 1,
    key: Annotated[Path | None, typer.Option(help="Public key (PEM): an unsigned bundle is then refused.")] = None,
    storage_uri: Annotated[
        str | None, typer.Option(help="Where KServe will find the repository: s3://, gs://, pvc://, ...")
    ] = None,
    model: Model = None,
    data: Data = None,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Writes the sealed bundle of a run, or puts a bundle into an inference server's model repository.

    Example: `passdeploy ship runs/demo --server triton --out models`
    """
    if server is None:
        _only_with(
            "--server",
            {"--name": name, "--kind": kind != "auto", "--instances": instances != 1, "--key": key,
             "--storage-uri": storage_uri},
        )  # fmt: skip
        if (source is None) == (out is None):
            raise typer.BadParameter("give one run directory, or a bundle with --server")
        staged("ship", source or out, model, data, json_)  # type: ignore[arg-type]
        return
    from passdeploy.shipping.repository import write_repository

    if source is None:
        raise typer.BadParameter("give the bundle or run directory that --server serves")
    _only_with("a run whose bundle is written, without --server", {"--model": model, "--data": data})
    if server == "mlserver":
        _only_with("--server triton or kserve", {"--kind": kind != "auto", "--instances": instances != 1})
    if server in ("triton", "mlserver"):
        _only_with("--server kserve", {"--storage-uri": storage_uri})
    written = write_repository(
        out or Path("models"),
        source,
        server,
        name=name,
        kind=kind,
        instances=instances,
        key=key,
        storage_uri=storage_uri,
    )
    if json_:
        print_json({k: str(v) if isinstance(v, Path) else v for k, v in vars(written).items()})
    else:
        out_console.print(
            f"{written.folder}: model {written.model} ({written.kind}); serve it with\n  {written.start}",
            markup=False,
            soft_wrap=True,  # a path that is cut is no path
        )
        if written.note:
            out_console.print(written.note, markup=False, soft_wrap=True)
