"""`ringcompile transform`: compile a model and write one program per rank."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ringcompile.commands.options import (
    JSON,
    MODEL,
    PARALLEL,
    ModelArgument,
    compile_options,
    model_options,
    working,
)
from ringcompile.commands.overlap import Overlap, overlap_options
from ringcompile.errors import RingCompileError
from ringcompile.garbage import few_collections
from ringcompile.later import Later
from ringcompile.mesh import Mesh
from ringcompile.options import Options

if TYPE_CHECKING:
    from ringcompile import compiler, pass_list
    from ringcompile.artifact import files
    from ringcompile.capture import export
    from ringcompile.ir import plan as plans
    from ringcompile.ir import printer, stretched
    from ringcompile.ir.program import Program
    from ringcompile.parallel_program import ParallelProgram
    from ringcompile.passes import base
else:
    compiler = Later("ringcompile.compiler")
    pass_list = Later("ringcompile.pass_list")
    files = Later("ringcompile.artifact.files")
    export = Later("ringcompile.capture.export")
    plans = Later("ringcompile.ir.plan")
    printer = Later("ringcompile.ir.printer")
    stretched = Later("ringcompile.ir.stretched")
    base = Later("ringcompile.passes.base")


@click.command()
@MODEL
@click.option("-o", "--out", type=click.Path(path_type=Path), help="The folder to write.")
@PARALLEL
@compile_options
@click.option("--plan", type=click.Path(path_type=Path),
              help="A file that says along which axes each weight is split: the edited output of "
              "`ringcompile dump OUT --format plan`.")
@overlap_options
@model_options
@click.option("--no-weights", is_flag=True,
              help="Write the programs without weights, for `simulate` and `view`. Weights are not "
              "loaded.")
@click.option("--overwrite", is_flag=True, help="Replace the artifact in the folder, if any.")
@click.option("--sign", type=click.Path(path_type=Path), metavar="KEY",
              help="Sign the artifact with the ed25519 key in this PEM file.")
@click.option("--passes", metavar="LIST",
              help="Run only these passes, separated by commas, and print the result instead of "
              "writing a folder.")
@click.option("--print-ir-after-all", is_flag=True, help="Print the program after every pass.")
@click.option("--time-passes", is_flag=True, help="Print how many seconds each pass took.")
@click.option("--verify-each", is_flag=True,
              help="Check the programs of all ranks against each other before writing.")
@JSON
@few_collections()
def transform(
    model: ModelArgument,
    out: Path | None,
    parallel: str,
    plan: Path | None,
    overlap: Overlap,
    no_weights: bool,
    overwrite: bool,
    sign: Path | None,
    passes: str | None,
    print_ir_after_all: bool,
    time_passes: bool,
    verify_each: bool,
    as_json: bool,
    options: Options,
) -> None:
    """Compile MODEL into OUT, a folder with one program per rank.

    Such a folder is called an artifact. All other commands that take OUT read it.
    """
    mesh = overlap.mesh(parallel)
    _check_target(out, overwrite, passes)
    program = _captured(model, options.length, weights=not no_weights and out is not None)
    told = None if plan is None else plans.read_plan(plan, program, mesh)
    if passes is not None:
        front = _front_passes(mesh, options, told)
        click.echo(printer.print_program(_run_passes(program, passes, front, mesh)))
        return
    seconds: dict[str, float] = {}
    with working("transforming"):
        made = compiler.transform(
            program, mesh, plan=told,
            observe=_observer(print_ir_after_all, time_passes, seconds),
            record=_record(model, overlap),
            schedule=overlap.schedule(program, mesh, options.length), **options.given(),
        )
        if verify_each:
            made.verify()
    with working(f"writing {mesh.world_size} programs"):
        assert out is not None
        made.save(out, overwrite=overwrite, sign_with=sign)
    _print_times(seconds if time_passes else {})
    _print_summary(out, made, as_json)


def _check_target(out: Path | None, overwrite: bool, passes: str | None) -> None:
    if out is None and passes is None:
        raise click.UsageError("give a folder to write with -o, or passes to print with --passes")
    if out is not None:
        files.check_free(out.resolve(), overwrite)


def _captured(model: ModelArgument, length: int | None, *, weights: bool) -> Program:
    with working(f"loading {model.name}"):
        loaded = model.load(length, weights=weights)
    with working("capturing"):
        return export.capture(
            loaded.module, loaded.args, loaded.kwargs, name=loaded.name, dims=model.dims
        )


def _record(model: ModelArgument, overlap: Overlap) -> dict[str, Any]:
    """What the artifact keeps of the command line."""
    return {
        "model": model.name, "dtype": model.dtype, "batch": model.batch, "dims": model.dims,
        "overlap": overlap.kind, "overlap_on": overlap.cluster,
        "extra_inputs": list(model.extra_inputs),
    }


def _front_passes(mesh: Mesh, options: Options, plan: plans.SplitPlan | None) -> list[base.Pass]:
    told = plan.told("tp") if plan else None
    return pass_list.front_passes(mesh, compiler.with_plan(options, plan), told)


def _run_passes(
    program: Program, names: str, front: Sequence[base.Pass], mesh: Mesh
) -> Program:
    known: dict[str, base.Pass] = {
        step.name: step for step in (*front, *pass_list.rank_passes(0, mesh))
    }
    for name in filter(None, (part.strip() for part in names.split(","))):
        if name not in known:
            raise RingCompileError(f"unknown pass '{name}'", hint=f"passes: {', '.join(known)}")
        program = base.Pipeline([known[name]]).run(program)
    return program


def _observer(
    print_each: bool, time_passes: bool, seconds: dict[str, float]
) -> Callable[[base.Pass, Program, float], None] | None:
    """What is called after each pass; None where nobody asks.

    What is observed is compiled layer by layer, each by itself, which takes longer.
    """
    if not print_each and not time_passes:
        return None

    def observe(step: base.Pass, program: Program, spent: float) -> None:
        seconds[step.name] = seconds.get(step.name, 0.0) + spent
        if print_each:
            click.echo(printer.print_program(program))

    return observe


def _print_times(seconds: dict[str, float]) -> None:
    for name, spent in seconds.items():
        click.echo(f"{name:16} {spent:8.3f} s", err=True)


def _print_summary(out: Path, made: ParallelProgram, as_json: bool) -> None:
    program = made.program
    assert program.sequence is not None
    sizes = [stretched.num_nodes(made.rank(rank).graph) for rank in range(made.world_size)]
    facts = {
        "out": str(out),
        "model": program.name,
        "parallel": str(made.mesh),
        "ranks": made.world_size,
        "order": program.sequence.order,
        "nodes": sizes,
        "notes": list(made.notes),
    }
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    click.echo(
        f"wrote {out}: {program.name}, {made.mesh}, {program.sequence.order}, "
        f"{made.world_size} programs of {max(sizes)} nodes"
    )
    for note in made.notes:
        click.echo(f"note: {note}")
    name = shlex.quote(str(out))
    click.echo(f"next: ringcompile run {name}, ringcompile view {name}")
