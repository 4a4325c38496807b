"""The command line: every command reads its arguments, calls `rescompile.api`, and prints what comes back.

Exit codes: 0 done; 1 the model or the request cannot be served; 2 wrong usage; 3 verification failed, nothing written.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rescompile.cli_exit import run_and_exit
from rescompile.cli_options import (
    ArtifactOut,
    Backend,
    DialectOption,
    Init,
    Inputs,
    Json,
    Model,
    ModelOut,
    NoVerify,
    Passes,
    Trust,
)
from rescompile.cli_output import html_page, say, say_json, show, stage
from rescompile.errors import EXIT_USAGE, RescompileError

if TYPE_CHECKING:
    from rescompile.graph import Graph

app = typer.Typer(
    name="rescompile",
    help="Find the residual connections of a model, rewrite them, prove what the rewrite did, and compile the result.",
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def common(
    context: typer.Context,
    show_traceback: Annotated[bool, typer.Option("--traceback", help="show where an error comes from")] = False,
    version: Annotated[bool, typer.Option("--version", help="print the version and stop")] = False,
) -> None:
    # The program's help, in the place of this function's own documentation, is given to `app`.
    context.obj = show_traceback
    if version:
        import rescompile

        say(f"rescompile {rescompile.__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        say(context.get_help())
        raise typer.Exit(EXIT_USAGE)


@app.command()
def inspect(
    model: Model,
    inputs: Inputs = None,
    trust: Trust = False,
    as_json: Json = False,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="write the report as a page too")] = None,
    why: Annotated[
        str | None, typer.Option("--why", metavar="NODE", help="explain what was decided about one operation")
    ] = None,
    costs: Annotated[bool, typer.Option("--costs", help="show what every branch and shortcut costs")] = False,
    unfused: Annotated[
        bool, typer.Option("--unfused", help="list the joins that are not fused: why, and the bytes each costs")
    ] = False,
    extents: Annotated[
        list[str] | None,
        typer.Option("--extent", metavar="N=8", help="what a dynamic extent counts as in bytes; 1 otherwise; repeats"),
    ] = None,
    gradients: Annotated[
        bool, typer.Option("--gradients", help="run the model forwards and backwards: variance and gradient by block")
    ] = False,
    input_file: Annotated[
        Path | None, typer.Option("--input-file", metavar="X.npz", help="data for --gradients, by name; else random")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="draw what --gradients found, as .png or .svg")
    ] = None,
) -> None:
    """Show the residual structure of MODEL."""
    from rescompile.cli_files import check_writable, write_text

    sizes = _extents(extents, unfused)
    flow = None
    if unfused and (gradients or why is not None):
        raise _usage("--unfused is a report of its own: leave out --gradients and --why")
    if gradients or input_file is not None or plot is not None:
        from rescompile.cli_gradients import Flow

        flow = Flow(input_file, plot)
    if html is not None:
        check_writable(html)
    graph = _load(model, inputs, trust)
    from rescompile import api

    with stage("Looking for residual blocks"):
        report = replace(api.inspect(graph), show_costs=costs)
    if unfused:
        with stage("Planning the fusion"):
            audit = api.audit_report(graph, report, sizes)
        if html is not None:
            write_text(html, html_page(audit, model))
        if as_json:
            say_json({**report.to_dict(), "audit": audit.to_dict()})
        else:
            show(audit)
        return
    if flow is not None:
        with stage("Following the gradient"):
            flow.measure(graph, report)
    if html is not None:
        write_text(html, html_page(report, model) if flow is None else flow.html(report, model))
    if flow is not None and why is None:
        if as_json:
            say_json(flow.to_dict(report))
        else:
            show(report)
            if flow.found is not None:
                say("")
                show(flow.found)
    elif why is not None:
        _print_result(api.explain(graph, report, why), as_json)
    else:
        _print_result(report, as_json)
    if flow is not None and flow.refusal is not None:
        raise flow.refusal


@app.command()
def rewrite(
    model: Model,
    output: ModelOut = None,
    passes: Passes = None,
    inputs: Inputs = None,
    trust: Trust = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="plan only; write no model")] = False,
    plan_out: Annotated[
        Path | None, typer.Option("--plan-out", metavar="P.json", help="write the plan, for review and `apply`")
    ] = None,
    all_or_nothing: Annotated[
        bool, typer.Option("--all-or-nothing", help="write nothing when a pass refuses a place")
    ] = False,
    as_json: Json = False,
    no_verify: NoVerify = False,
    dialect: DialectOption = None,
    gradients: Annotated[
        bool, typer.Option("--gradients", help="measure what it does to training: gradient and E[x²] by block")
    ] = False,
    init: Annotated[
        Init, typer.Option("--init", help="weights for --gradients: the given ones, or new ones (Xavier)")
    ] = Init.GIVEN,
    input_file: Annotated[
        Path | None, typer.Option("--input-file", metavar="X.npz", help="data for --gradients, by name; else random")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="draw what --gradients found, as .png or .svg")
    ] = None,
) -> None:
    """Rewrite MODEL by passes, verify, write OUT."""
    from rescompile.cli_files import check_writable, write_text

    specs = _passes(passes)
    comparison = None
    if gradients or init is not Init.GIVEN or input_file is not None or plot is not None:
        from rescompile.cli_gradients import Comparison

        if dry_run:
            raise _usage("A dry run makes no model whose gradients could be measured: leave out --dry-run")
        comparison = Comparison(input_file, plot, init.value)
    if not dry_run:
        _check_model_out(model, output)
    if plan_out is not None:
        check_writable(plan_out)
    graph = _load(model, inputs, trust)
    from rescompile import api

    if dry_run:
        with stage("Planning"):
            plan = api.plan(graph, specs, dialect=dialect)
        if plan_out is not None:
            write_text(plan_out, plan.to_json())
        _print_result(plan, as_json)
        return
    with stage("Rewriting"):
        in_place = no_verify and not all_or_nothing and comparison is None
        options: dict[str, Any] = {"all_or_nothing": all_or_nothing, "in_place": in_place, "dialect": dialect}
        result = api.rewrite(graph, specs, verify=not no_verify, **options)
    _save(result, output)
    if plan_out is not None:
        write_text(plan_out, result.plan.to_json())
    if comparison is None:
        _print_result(result, as_json)
        return
    with stage("Following the gradient"):
        comparison.measure(result)
    if as_json:
        say_json(comparison.to_dict(result))
    else:
        show(result)
        if comparison.found is not None:
            say("")
            show(comparison.found)
    if comparison.refusal is not None:
        raise comparison.refusal


@app.command()
def apply(
    model: Model,
    plan: Annotated[Path, typer.Argument(metavar="P.json", help="a plan written by `rewrite --plan-out`")],
    output: ModelOut = None,
    inputs: Inputs = None,
    trust: Trust = False,
    as_json: Json = False,
    no_verify: NoVerify = False,
    dialect: DialectOption = None,
) -> None:
    """Apply a reviewed plan to MODEL, verify, write OUT."""
    _check_model_out(model, output)
    text = _read_text(plan)
    from rescompile import api

    edits = api.load_plan(text)
    graph = _load(model, inputs, trust)
    with stage("Applying the plan"):
        result = api.apply(graph, edits, verify=not no_verify, dialect=dialect)
    _save(result, output)
    _print_result(result, as_json)


@app.command()
def diff(
    before: Annotated[str, typer.Argument(metavar="A", help="the model before")],
    after: Annotated[str, typer.Argument(metavar="B", help="the model after")],
    inputs: Inputs = None,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Show what changed from model A to model B."""
    graphs = [_load(model, inputs, trust) for model in (before, after)]
    from rescompile import api

    with stage("Comparing"):
        found = api.diff(*graphs, names=(before, after))
    _print_result(found, as_json)


@app.command("compile")
def compile_(
    model: Model,
    output: ArtifactOut,
    target: Annotated[
        str, typer.Option("--target", help="cpu, cuda:sm_90, cuda:sm_80,sm_90, or a target in TVM's own spelling")
    ] = "cpu",
    passes: Passes = None,
    inputs: Inputs = None,
    trust: Trust = False,
    tune: Annotated[
        int, typer.Option("--tune", metavar="TRIALS", min=0, help="trials to spend on tuning; 0 tunes nothing")
    ] = 0,
    database: Annotated[
        Path | None, typer.Option("--db", metavar="DIR", help="where tuning records are read and kept")
    ] = None,
    buckets: Annotated[
        str,
        typer.Option("--buckets", metavar="SIZES", help="sizes of a dynamic batch to compile for, on a GPU: 1,8,32"),
    ] = "",
    explain: Annotated[
        bool, typer.Option("--explain", help="list the regions: what computes them, what they move, what bounds them")
    ] = False,
    gpu: Annotated[
        str | None, typer.Option("--gpu", metavar="NAME", help="the GPU to predict times for: H200, A100, L40S, ...")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compile MODEL through TVM into ARTIFACT.

    The artifact runs in a process that has neither torch nor the model's code.
    """
    from rescompile import api
    from rescompile.backends.require import require_tvm
    from rescompile.cli_files import check_writable
    from rescompile.cli_run import describe, explained, predicted_gpu, program_data

    require_tvm()
    from rescompile.backends import targets

    predicted = predicted_gpu(targets.resolve_all(target)[0], gpu)
    sizes = _sizes(buckets)
    specs = _passes(passes, api.COMPILE_PASSES)
    check_writable(output)
    graph = _load(model, inputs, trust)

    with stage(f"Compiling for {target}"):
        tuning = api.Tuning(trials=tune, database=None if database is None else str(database))
        program = api.compile(graph, target=target, passes=specs, tune=tuning, buckets=sizes)
        program.save(output)
    if as_json:
        say_json(program_data(program, predicted))
    else:
        say(describe(program, output))
        if explain:
            say(explained(program, predicted))


@app.command()
def run(
    model: Annotated[str, typer.Argument(metavar="ARTIFACT|MODEL", help="a compiled artifact, or any MODEL")],
    input_file: Annotated[
        Path | None, typer.Option("--input-file", metavar="X.npz", help="arrays by input name; random ones otherwise")
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="Y.npz", help="where the outputs go")] = None,
    backend: Annotated[Backend, typer.Option("--backend", help="what runs it")] = Backend.TVM,
    inputs: Inputs = None,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Run an artifact or a model on given or random inputs."""
    from rescompile.cli_files import check_writable

    if output is not None:
        check_writable(output)
    from rescompile import cli_run

    with stage("Running"):
        outputs = cli_run.run(model, backend.value, inputs or [], trust, input_file)
    if output is not None:
        from rescompile.arrays import save_arrays

        save_arrays(output, outputs)
    summary = cli_run.summaries(outputs)
    if as_json:
        say_json({"outputs": summary})
    else:
        say(cli_run.print_summaries(summary))


@app.command()
def bench(
    model: Model,
    against: Annotated[
        str, typer.Option("--against", metavar="NAMES", help="of eager, inductor and onnxruntime, with commas")
    ] = "eager,onnxruntime",
    inputs: Inputs = None,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Measure MODEL, compiled, against other runtimes.

    All run in one process, interleaved in blocks, on the same random inputs.
    """
    names = [name.strip() for name in against.split(",") if name.strip()]
    known = [backend.value for backend in Backend if backend is not Backend.TVM]
    for name in names:
        if name not in known:
            raise _usage(f"There is no runtime '{name}' to measure against", name, known)
    graph = _load(model, inputs, trust)
    from rescompile.cli_bench import bench_graph

    with stage("Measuring"):
        result = bench_graph(graph, names)
    _print_result(result, as_json)


@app.command()
def explore(
    model: Model,
    every: Annotated[str, typer.Option("--every", metavar="N,...", help="layers that a shortcut skips")] = "1,2,3",
    joins: Annotated[
        str, typer.Option("--join", metavar="JOIN,...", help="where the skip joins")
    ] = "before-activation,after,pre-activation",
    kinds: Annotated[
        str, typer.Option("--kind", metavar="KIND,...", help="of add, gated, dense, long")
    ] = "add,gated,dense",
    passes: Annotated[
        list[str] | None, typer.Option("--pass", metavar="SPEC", help="a candidate of your own, in place of the above")
    ] = None,
    train: Annotated[
        str | None,
        typer.Option("--train", metavar="MODULE:FUNCTION", help="function(model, report, steps) returns a loss"),
    ] = None,
    steps: Annotated[int, typer.Option("--steps", help="how long each candidate trains")] = 100,
    storage: Annotated[
        str | None, typer.Option("--storage", metavar="URL", help="database of the study; STUDY.db here otherwise")
    ] = None,
    study: Annotated[str, typer.Option("--study", help="name of the study in the database")] = "rescompile",
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="draw it, as .png or .svg")] = None,
    seed: Annotated[int, typer.Option("--seed", help="of new weights and random inputs")] = 0,
    inputs: Inputs = None,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Try placements of shortcuts in MODEL: costs, gradient flow and, with --train, losses side by side."""
    from rescompile.cli_explore import run_explore, training_of

    training = None if train is None else training_of(train, steps, storage, study, seed)
    graph = _load(model, inputs, trust)
    with stage("Exploring"):
        found = run_explore(
            graph,
            every=every,
            joins=joins,
            kinds=kinds,
            passes=passes or [],
            training=training,
            plot=plot,
            seed=seed,
        )
    _print_result(found, as_json)


@app.command("passes")
def passes_(as_json: Json = False) -> None:
    """List the passes, their options, what they preserve."""
    from rescompile.cli_passes import catalogue, print_catalogue

    entries = catalogue()
    if as_json:
        say_json({"schema": 1, "passes": entries})
    else:
        say(print_catalogue(entries))


# ---- shared by the commands ----------------------------------------------------------------------------------------


def _load(model: str, inputs: list[str] | None, trust: bool) -> Graph:
    from rescompile.cli_models import load_model

    with stage(f"Loading {model}"):
        return load_model(model, inputs or [], trust)


def _passes(specs: list[str] | None, otherwise: Sequence[str] = ("fuse",)) -> list[Any]:
    """The passes of the command line, parsed before anything long begins."""
    from rescompile.api import resolve

    return resolve(specs or list(otherwise))


def _check_model_out(model: str, output: Path | None) -> None:
    """The output is given, can be written, and has the suffix of the kind of model that goes in."""
    from rescompile.cli_files import check_writable
    from rescompile.locate import model_form

    suffix = ".onnx" if model_form(model) == "onnx" else ".pt2"
    if output is None:
        raise _usage(f"Say where the model goes: -o OUT{suffix}")
    if output.suffix.lower() != suffix:
        raise _usage(f"A model comes back as what went in: '{output}' must end in {suffix}")
    check_writable(output)


def _save(result: Any, output: Path | None) -> None:
    if output is not None:
        if not result.applied and result.plan.refusals and not result.rolled_back:
            reason = result.plan.refusals[0].reason
            raise RescompileError(f"Nothing was rewritten, so nothing was written to '{output}': {reason}.")
        with stage(f"Writing {output}"):
            result.save(str(output))


def _print_result(result: Any, as_json: bool) -> None:
    if as_json:
        say_json(result.to_dict())
    else:
        show(result)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not a text file"
        raise RescompileError(f"Cannot read '{path}': {reason}.") from error


def _extents(given: list[str] | None, unfused: bool) -> dict[str, int]:
    """What `N=8` says of dynamic extents."""
    if given and not unfused:
        raise _usage("--extent says what bytes are counted for: give --unfused too")
    found: dict[str, int] = {}
    for text in given or []:
        name, _, number = text.partition("=")
        if not name or not number.isdecimal():
            raise _usage(f"Cannot read the extent '{text}': write NAME=NUMBER, as N=8")
        found[name] = int(number)
    return found


def _sizes(spelled: str) -> list[int]:
    """Sizes with commas between them."""
    parts = [part.strip() for part in spelled.split(",") if part.strip()]
    for part in parts:
        if not part.isdecimal() or int(part) < 1:
            raise _usage(f"'{part}' is no size of a batch: --buckets takes whole numbers from 1 with commas, 1,8,32.")
    return [int(part) for part in parts]


def _usage(what: str, name: str = "", known: Sequence[str] = ()) -> RescompileError:
    from rescompile.errors import nearest
    from rescompile.specs import SpecError

    choices = f": choose from {', '.join(known)}" if known else ""
    return SpecError(f"{what}{nearest(name, known) if known else ''}{choices}.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: errors are one sentence on stderr, a traceback only with --traceback."""
    run_and_exit(app, list(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    main()
