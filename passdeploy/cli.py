"""The command line: parses, calls, prints. No logic."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

# Before torch is imported: spinning threads of one library spoil the other's measurements. A spin of some ten
# microseconds does no harm, and saves a training step the sleep between two operators (a fifth of it on two cores).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
os.environ.setdefault("KMP_BLOCKTIME", "0")

import typer
from rich.console import Console

from passdeploy.errors import BadInput, PassdeployError

app = typer.Typer(
    name="passdeploy",
    help="Makes a trained vision network meet a latency on real hardware, and proves each step on the way.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
out_console = Console(highlight=False, emoji=False)
INTERRUPTED = 130

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, nothing else.")]
Out = Annotated[Path, typer.Option("--out", help="Run directory.")]

Exclude = Annotated[list[str] | None, typer.Option(help="Module or pattern that stays whole; repeatable.")]
MinWidth = Annotated[list[str] | None, typer.Option(help="Least channels, NAME=CHANNELS; repeatable.")]
FixedWidth = Annotated[list[str] | None, typer.Option(help="Channels to have, NAME=CHANNELS; repeatable.")]
Tie = Annotated[list[str] | None, typer.Option(help="Layers that keep the same channels, NAME,NAME; repeatable.")]

MODEL = typer.Option("--model", help="Name, or module:function that returns an nn.Module.")
OPTIONS: dict[str, Any] = {}


def _print_json(value: object) -> None:
    sys.stdout.write(json.dumps(value, indent=1) + "\n")


def _values(**flags: Any) -> dict[str, Any]:
    """Flags that were given, as configuration values."""
    return {key: value for key, value in flags.items() if value is not None}


def _configuration(config: Path | None, flags: dict[str, Any], console: bool = True, needs_data: bool = True) -> Any:
    """File, then flags; the embedded demo when neither names a model or data."""
    from passdeploy.api import configure

    made, note = configure(config, flags, needs_data)
    if note and console:
        Console(stderr=True, highlight=False, emoji=False).print(note, markup=False, soft_wrap=True)
    return made


@app.command()
def run(
    model: Annotated[str | None, MODEL] = None,
    weights: Annotated[str | None, typer.Option(help="Weights: safetensors, or a tensor-only .pth.")] = None,
    data: Annotated[str | None, typer.Option(help="Name, image folder, or module:function.")] = None,
    task: Annotated[str | None, typer.Option(help="classification or segmentation; default: the data's.")] = None,
    target: Annotated[str | None, typer.Option(help="cpu, a100, h100, l4, ... (passdeploy targets).")] = None,
    latency: Annotated[str | None, typer.Option(help="5ms, 800us, 2x; several: 2x,3x; or fastest.")] = None,
    min_accuracy: Annotated[float | None, typer.Option(help="At least this on validation (0.93).")] = None,
    backend: Annotated[str | None, typer.Option(help="onnxruntime, openvino, tensorrt_rtx, ...")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32 (CPU), fp16 (GPU), bf16, int8, fp8.")] = None,
    batch: Annotated[int | None, typer.Option(help="Images per inference.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of one inference.")] = None,
    percentile: Annotated[str | None, typer.Option(help="p50, p90 or p99.")] = None,
    method: Annotated[str | None, typer.Option(help="pass, pass-paper, l1, ...")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes of fine-tuning.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same run.")] = None,
    profile: Annotated[str | None, typer.Option(help="Latency profile measured elsewhere.")] = None,
    exclude: Exclude = None,
    min_width: MinWidth = None,
    fixed_width: FixedWidth = None,
    tie: Tie = None,
    require_measured: Annotated[
        bool, typer.Option("--require-measured", help="Exit 1 if nothing was measured.")
    ] = False,
    config: Annotated[Path | None, typer.Option(help="YAML file (default: ./passdeploy.yaml).")] = None,
    out: Out = Path("runs/latest"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete what an earlier run left in --out.")] = False,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Makes the network meet the latency: profile, search, fit, fine-tune, compile, measure, report, bundle.

    Example: `passdeploy run --model resnet20 --data fashion-mnist --target cpu --latency 2x --out runs/demo`

    The other way round: `--latency fastest --min-accuracy 0.93`.

    Exit status: 0 goal met or unverified, 1 goal not met, 2 bad input, 130 interrupted (run again to continue).
    """
    from passdeploy.config import groups_flags
    from passdeploy.console import Ui
    from passdeploy.pipeline import Run

    flags = _values(
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
    made = _configuration(config, flags, console=not json_)
    running = Run(made, out, Ui(quiet=json_), fresh=fresh, command=shlex.join(["passdeploy", *sys.argv[1:]]))
    reports = running.run()
    if json_:
        _print_json([report.to_json() for report in reports] if len(reports) > 1 else reports[0].to_json())
    else:
        from passdeploy.summary import render

        for budget, report in zip(running.answers, reports, strict=True):
            out_console.print(render(report, budget.space.root))
    raise typer.Exit(exit_code(reports, made.require_measured))


def exit_code(reports: list[Any], require_measured: bool) -> int:
    """The worst of the budgets: 0 met or unverified, 1 not met."""
    missed = any(not report.goal_met for report in reports)
    unmeasured = require_measured and any(report.status == "unverified" for report in reports)
    return int(missed or unmeasured)


def _staged(name: str, out: Path, model: str | None, json_: bool, masked: bool = False) -> None:
    """Runs the stages up to `name` over an existing run directory."""
    from passdeploy.api import run_stage

    folders = run_stage(name, out, model=model, quiet=json_, masked=masked)
    if json_:
        _print_json({"stage": name, "folders": [str(folder) for folder in folders]})
    else:
        for folder in folders:
            out_console.print(f"{name}: {folder}", markup=False)


def _stage_command(name: str, what: str) -> None:
    def command(
        out: Out,
        model: Annotated[str | None, MODEL] = None,
        json_: Json = False,
        debug: Debug = False,
    ) -> None:
        _staged(name, out, model, json_)

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
        bool, typer.Option("--masked", help="The masked network too, as it is: dense, masked and thin side by side.")
    ] = False,
    model: Annotated[str | None, MODEL] = None,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Exports and compiles the thin network, and proves that it computes the same function.

    Example: `passdeploy compile --out runs/demo` (needs `config.yaml` there, as `run` writes it)
    """
    _staged("compile", out, model, json_, masked)


@app.command()
def profile(
    save: Annotated[Path, typer.Option("--save", help="Where the latency profile is written.")],
    model: Annotated[str | None, MODEL] = None,
    weights: Annotated[str | None, typer.Option(help="Weights: safetensors, or a tensor-only .pth.")] = None,
    data: Annotated[str | None, typer.Option(help="Name, image folder, or module:function.")] = None,
    target: Annotated[str | None, typer.Option(help="cpu, a100, h100, l4, ... (passdeploy targets).")] = None,
    backend: Annotated[str | None, typer.Option(help="onnxruntime, openvino, tensorrt_rtx, ...")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32 (CPU), fp16 (GPU), bf16, int8, fp8.")] = None,
    batch: Annotated[int | None, typer.Option(help="Images per inference.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of one inference.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file (default: ./passdeploy.yaml).")] = None,
    out: Out = Path("runs/profile"),
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Measures structures on the target and writes the latency model as a portable file.

    Example: `passdeploy profile --model resnet20 --data fashion-mnist --target cpu --save cpu.profile.json`, and on the
    machine that searches: `passdeploy run ... --profile cpu.profile.json`
    """
    from passdeploy.api import save_profile

    flags = _values(
        model=model,
        weights=weights,
        data=data,
        target=target,
        backend=backend,
        precision=precision,
        batch=batch,
        threads=threads,
    )
    facts = save_profile(_configuration(config, flags, console=not json_), out, save, quiet=json_)
    if json_:
        _print_json(facts)
    else:
        out_console.print(
            f"{save}: {facts['n']} structures, mean error {facts['mape']:.1%}, largest {facts['max_ape']:.1%} "
            f"(cross-validated; a measurement repeats within {facts['repeatability']:.1%})",
            markup=False,
        )


@app.command()
def bench(
    engines: Annotated[list[str], typer.Argument(help="Engines, ONNX files, run directories or bundles.")],
    target: Annotated[str, typer.Option(help="Where they run.")] = "cpu",
    backend: Annotated[str | None, typer.Option(help="Compiles the ONNX files.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads, for ONNX files.")] = 1,
    fail_if_slower: Annotated[str | None, typer.Option(help="Exit 1 if slower than the first by more: 5%.")] = None,
    against: Annotated[Path | None, typer.Option(help="Stored report.json: judge the ratio of the two given.")] = None,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Times engines side by side, interleaved; the first is the reference.

    Example: `passdeploy bench runs/demo/dense.onnx runs/demo --fail-if-slower 5%`

    Exit status with --fail-if-slower: 0 not slower, 1 slower, 3 inconclusive.
    """
    from passdeploy import benching
    from passdeploy.summary import bench_table

    margin = benching.parse_margin(fail_if_slower or "5%")
    comparison = benching.compare(engines, target, backend, threads)
    code, said = 0, None
    if against is not None:
        code, said = benching.against_report(comparison, against, margin)
    elif fail_if_slower is not None:
        code = benching.outcome(comparison, margin)
    if json_:
        _print_json(benching.to_json(comparison) | {"outcome": code, "message": said})
    else:
        out_console.print(bench_table(comparison))
        if said:
            out_console.print(said, markup=False)
    raise typer.Exit(code if fail_if_slower is not None or against is not None else 0)


@app.command()
def report(
    runs: Annotated[
        list[Path] | None, typer.Argument(help="Run directories, folders of them, or report.json files.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Run directory whose report is written again.")] = None,
    form: Annotated[
        str, typer.Option("--format", help="json, markdown, html, history, junit, github-action-benchmark.")
    ] = "markdown",
    trtexec: Annotated[
        list[Path] | None, typer.Option(help="What trtexec --exportTimes wrote, to stand beside the run's own.")
    ] = None,
    model: Annotated[str | None, MODEL] = None,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Prints the report of one run, or of several side by side, in a format for people or for CI.

    `history` is a page with the trend over commits and the best trade-offs. Fills $GITHUB_STEP_SUMMARY where it is
    set. With --out alone it writes the report stage of that run again.

    Example: `passdeploy report runs/demo --format junit > report.xml`
    """
    if not runs:
        if out is None:
            raise typer.BadParameter("give run directories, or --out DIR")
        _staged("report", out, model, json_)
        return
    from passdeploy.reporting import load_report
    from passdeploy.reporting.exporters import export, write_step_summary
    from passdeploy.reporting.files import find_reports
    from passdeploy.reporting.trtexec import attach

    loaded = attach([load_report(path) for given in runs for path in find_reports(given)], trtexec or [])
    write_step_summary(loaded)
    sys.stdout.write(export(loaded, "json" if json_ else form).rstrip("\n") + "\n")


@app.command()
def ship(
    source: Annotated[Path | None, typer.Argument(help="Bundle, or a run directory that has one.")] = None,
    server: Annotated[str | None, typer.Option(help="triton, mlserver or kserve.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Model repository (with --server), or run directory.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Of the model; default: the bundle's.")] = None,
    kind: Annotated[str, typer.Option(help="auto, python, onnxruntime or tensorrt.")] = "auto",
    instances: Annotated[int, typer.Option(help="Of the model, per device (Triton).")] = 1,
    key: Annotated[Path | None, typer.Option(help="Public key: the bundle must be signed with its other half.")] = None,
    storage_uri: Annotated[str | None, typer.Option(help="Where KServe will find the repository.")] = None,
    model: Annotated[str | None, MODEL] = None,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Writes the sealed bundle of a run, or puts a bundle into an inference server's model repository.

    Example: `passdeploy ship runs/demo --server triton --out models`
    """
    if server is None:
        if source is None and out is None:
            raise typer.BadParameter("give a run directory, or a bundle with --server")
        _staged("ship", source or out, model, json_)  # type: ignore[arg-type]
        return
    from passdeploy.shipping.repository import write_repository

    if source is None:
        raise typer.BadParameter("give the bundle or run directory that --server serves")
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
        _print_json({k: str(v) if isinstance(v, Path) else v for k, v in vars(written).items()})
    else:
        out_console.print(
            f"{written.folder}: model {written.model} ({written.kind}); serve it with\n  {written.start}", markup=False
        )
        if written.note:
            out_console.print(written.note, markup=False)


@app.command()
def compare(
    methods: Annotated[str, typer.Option(help="Separated by commas, or all.")] = "pass,pass-paper,l1,mdp",
    latency: Annotated[str | None, typer.Option(help="Budgets: 2x,3x.")] = None,
    seeds: Annotated[str, typer.Option(help="Separated by commas.")] = "0",
    axis: Annotated[str | None, typer.Option(help="latency: measured; macs: as in papers.")] = None,
    split: Annotated[str, typer.Option(help="Accuracy shown: validation (to choose by) or test.")] = "test",
    model: Annotated[str | None, MODEL] = None,
    weights: Annotated[str | None, typer.Option(help="Weights: safetensors, or a tensor-only .pth.")] = None,
    data: Annotated[str | None, typer.Option(help="Name, image folder, or module:function.")] = None,
    target: Annotated[str | None, typer.Option(help="cpu, a100, h100, l4, ... (passdeploy targets).")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes of fine-tuning.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file (default: ./passdeploy.yaml).")] = None,
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

    flags = _values(model=model, weights=weights, data=data, target=target, latency=latency, epochs=epochs, axis=axis)
    made = _configuration(config, flags, console=not json_)
    outcome = run_comparison(made, methods, seeds, out, split=split, ui=Ui(quiet=json_))
    if json_:
        rows = [row.to_json() for row in outcome.rows]
        _print_json({"rows": rows, **summary(outcome.rows, split), "failed": outcome.failed})
    else:
        out_console.print(tables(outcome.rows, split))
        out_console.print(f"\n{out / 'compare.html'}", markup=False, soft_wrap=True)
    raise typer.Exit(1 if outcome.failed else 0)


@app.command()
def study(
    name: Annotated[str, typer.Argument(help="ablation, prompts, transfer, prompt-content, markov or vit.")],
    latency: Annotated[str | None, typer.Option(help="Budgets: 2x,3x.")] = None,
    seeds: Annotated[str, typer.Option(help="Separated by commas.")] = "0",
    model: Annotated[str | None, MODEL] = None,
    data: Annotated[str | None, typer.Option(help="Name, image folder, or module:function.")] = None,
    to: Annotated[str | None, typer.Option(help="Second data set, for transfer.")] = None,
    target: Annotated[str | None, typer.Option(help="cpu, a100, h100, l4, ... (passdeploy targets).")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes of fine-tuning.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file (default: ./passdeploy.yaml).")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder (default: runs/study-NAME).")] = None,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Asks one question about the method, runs what answers it, and writes a page with numbers and a conclusion.

    Example: `passdeploy study ablation --seeds 0,1,2 --out runs/study-ablation`

    Started again it goes on where it was.
    """
    from passdeploy.config import merge
    from passdeploy.console import Ui
    from passdeploy.study.base import get_study
    from passdeploy.study.command import SMALL
    from passdeploy.study.command import study as run_study

    get_study(name)
    flags = _values(model=model, data=data, target=target, latency=latency, epochs=epochs)
    made = _configuration(config, flags if config else merge(SMALL, flags), console=not json_)
    findings, page = run_study(name, made, seeds, out or Path("runs") / f"study-{name}", to=to, ui=Ui(quiet=json_))
    if json_:
        _print_json({"study": name, "page": str(page), "conclusion": findings.conclusion, **findings.numbers})
    else:
        for sentence in findings.conclusion:
            out_console.print(f"- {sentence}", markup=False)
        out_console.print(str(page), markup=False, soft_wrap=True)


@app.command()
def targets(json_: Json = False, debug: Debug = False) -> None:
    """Lists the named targets, which are attached, and which backend would be used.

    Example: `passdeploy targets`
    """
    from passdeploy.doctor import list_targets, render_targets

    rows = list_targets()
    if json_:
        _print_json([vars(row) for row in rows])
    else:
        out_console.print(render_targets(rows))


@app.command()
def doctor(json_: Json = False, debug: Debug = False) -> None:
    """Says what this machine can do, and what is missing for the rest.

    Example: `passdeploy doctor`
    """
    from passdeploy.doctor import diagnose, render, to_json

    findings = diagnose()
    if json_:
        _print_json(to_json(findings))
    else:
        out_console.print(render(findings))
    raise typer.Exit(0 if to_json(findings)["ok"] else 1)


@app.command()
def groups(
    model: Annotated[str | None, MODEL] = None,
    data: Annotated[str | None, typer.Option(help="For the input size and classes.")] = None,
    profile: Annotated[str | None, typer.Option(help="Latency profile, for each group's share of the latency.")] = None,
    exclude: Exclude = None,
    min_width: MinWidth = None,
    fixed_width: FixedWidth = None,
    tie: Tie = None,
    config: Annotated[Path | None, typer.Option(help="YAML file (default: ./passdeploy.yaml).")] = None,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Shows which layers belong together: members, width, share of the MACs and of the latency of each group.

    Example: `passdeploy groups --model resnet20 --data fashion-mnist --min-width 'layer1.*=8'`
    """
    from passdeploy.config import groups_flags
    from passdeploy.summary import groups_table, groups_to_json, network_groups

    section = groups_flags(exclude, min_width, fixed_width, tie)
    flags = _values(model=model, data=data, profile_file=profile, groups=section)
    made = _configuration(config, flags, console=not json_, needs_data=False)
    subject = network_groups(made)
    if json_:
        _print_json(groups_to_json(subject))
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

    Exit status: 0 verified, 1 refused.
    """
    from passdeploy.shipping.verify import verify as check

    result = check(bundle, key, measure)
    if json_:
        _print_json(result.to_json())
    else:
        from passdeploy.summary import verification

        out_console.print(verification(result))
    raise typer.Exit(result.exit_code)


def fail(error: PassdeployError, as_json: bool) -> NoReturn:
    """Prints one line and exits."""
    line = " ".join(str(error).split())
    if as_json:
        _print_json({"error": line, "kind": type(error).__name__})
    Console(stderr=True, highlight=False, emoji=False).print("[bold red]error:[/] ", end="")
    Console(stderr=True, highlight=False, emoji=False).print(line, markup=False, soft_wrap=True)
    raise SystemExit(error.exit_code)


def main() -> None:
    """Entry point: errors become one line and an exit status."""
    try:
        from typer._click import ClickException
    except ImportError:  # typer before it brought its own
        from click import ClickException  # type: ignore[assignment]

    debug, as_json = "--debug" in sys.argv, "--json" in sys.argv
    try:
        code = app(standalone_mode=False)
    except typer.Exit as error:
        raise SystemExit(error.exit_code) from None
    except ClickException as error:
        if not sys.argv[1:]:  # no verb: the help, as it is
            print(error.format_message())
            raise SystemExit(0) from None
        verbs = {command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands}
        verb = "".join(f" {word}" for word in sys.argv[1:2] if word in verbs)
        fail(BadInput(f"{error.format_message().rstrip('.')}; see passdeploy{verb} --help"), as_json)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except PassdeployError as error:
        if debug:
            raise
        fail(error, as_json)
    except MemoryError:
        fail(PassdeployError("out of memory: lower train_batch or --batch, or use a smaller network"), as_json)
    if code == INTERRUPTED:  # typer turns Ctrl-C into this status, silently
        Console(stderr=True, emoji=False).print("interrupted: the same command continues where it stopped")
    raise SystemExit(code if isinstance(code, int) else 0)
