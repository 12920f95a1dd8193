"""The command line: parse, call, print, exit.

Exit codes: 0 done; 1 refused or failed, with one message on stderr; 2 wrong usage.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from ringcompile import compiler, execution
from ringcompile.capture.export import capture
from ringcompile.capture.loaders import DTYPES, LoadedModel, load_model
from ringcompile.commands.bench import bench
from ringcompile.commands.calibrate import calibrate
from ringcompile.commands.overlap import HALVES, halved, overlap_options, schedule_for
from ringcompile.commands.plan import plan
from ringcompile.commands.simulate import simulate
from ringcompile.dump import formats, render
from ringcompile.dump.report import Report
from ringcompile.errors import RingCompileError
from ringcompile.ir.plan import read_plan
from ringcompile.ir.printer import print_program
from ringcompile.ir.program import Program
from ringcompile.mesh import Mesh
from ringcompile.models import zoo
from ringcompile.passes.base import Pass, Pipeline
from ringcompile.passes.place import ORDERS, RINGS
from ringcompile.passes.regions import CAPACITIES

_CONSOLE = Console(stderr=True)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")
_PARALLEL = click.option(
    "--parallel", required=True, metavar="SPEC",
    help="The parallel spec: axes and sizes, such as ring=4 or pp=2,ring=4,tp=2; outermost first."
)
_ORDER = click.option(
    "--order", type=click.Choice(["auto", *ORDERS]), default="auto", show_default=True,
    help="Which positions a rank holds; auto is zigzag where all attention is causal.",
)
_CAPACITY = click.option(
    "--capacity", type=click.Choice(CAPACITIES), default=CAPACITIES[0], show_default=True,
    help="Whose tokens count where experts have a capacity: all of them, or each rank's own.",
)
_RING = click.option(
    "--ring", type=click.Choice(RINGS), default=RINGS[0], show_default=True,
    help="Keys and values rotate, or are gathered at once (short sequences).",
)
_TP_SEQUENCE = click.option(
    "--tp-sequence", is_flag=True, help="Divide the sequence over tp between the layers it splits."
)
_DTYPE = click.option("--dtype", type=click.Choice(DTYPES), help="Cast the model first.")
_BATCH = click.option("--batch", type=click.IntRange(1), default=1, show_default=True)


@click.group(context_settings={"auto_envvar_prefix": "RINGCOMPILE"})
@click.version_option(package_name="ringcompile")
def cli() -> None:
    """Compile a single-device PyTorch transformer into one program per GPU.

    MODEL is a zoo name (see `ringcompile models`), a folder with a Hugging Face checkpoint, or
    package.module:function returning a module and example inputs. Every option can also be set
    by a variable: RINGCOMPILE_TRANSFORM_PARALLEL=ring=4.

    Exit codes: 0 done, 1 refused or failed, 2 wrong usage.
    """


def main() -> None:
    """Entry point: an error of ours is one message and exit code 1, never a traceback."""
    try:
        sys.exit(cli.main(standalone_mode=False))
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("aborted", err=True)
        sys.exit(1)
    except RingCompileError as error:
        click.echo(str(error), err=True)
        sys.exit(1)


for _command in (simulate, plan, bench, calibrate):
    cli.add_command(_command)


@cli.command()
@_JSON
def models(as_json: bool) -> None:
    """List the zoo."""
    rows = {name: zoo.describe(name) for name in zoo.names()}
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    for name, text in rows.items():
        click.echo(f"{name:16} {text}")


@cli.command()
@click.argument("model")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder to write.")
@_PARALLEL
@_ORDER
@_CAPACITY
@_RING
@_TP_SEQUENCE
@click.option("--stages", metavar="LAYERS",
              help="Where pipeline stages but the first begin, for example model.layers.16.")
@click.option("--plan", type=click.Path(path_type=Path),
              help="What splits each weight: an edited `dump OUT --format plan`.")
@overlap_options
@_DTYPE
@_BATCH
@click.option("--seq", type=click.IntRange(1), help="Fix the sequence length (else any).")
@click.option("--gather-unknown", is_flag=True, help="Compute ops without a rule whole.")
@click.option("--no-weights", is_flag=True, help="Write graphs only; needs no memory for weights.")
@click.option("--overwrite", is_flag=True, help="Replace an artifact that is there.")
@click.option("--passes", metavar="LIST", help="Run only these passes and print the result.")
@click.option("--print-ir-after-all", is_flag=True, help="Print the program behind every pass.")
@click.option("--time-passes", is_flag=True, help="Print the seconds each pass took.")
@click.option("--verify-each", is_flag=True, help="Check the ranks against each other as well.")
@_JSON
def transform(
    model: str,
    out: Path | None,
    parallel: str,
    order: str,
    capacity: str,
    ring: str,
    tp_sequence: bool,
    stages: str | None,
    plan: Path | None,
    overlap: str,
    overlap_on: str,
    dtype: str | None,
    batch: int,
    seq: int | None,
    gather_unknown: bool,
    no_weights: bool,
    overwrite: bool,
    passes: str | None,
    print_ir_after_all: bool,
    time_passes: bool,
    verify_each: bool,
    as_json: bool,
) -> None:
    """Compile MODEL and write one program per rank to OUT."""
    mesh = Mesh.parse(parallel)
    if out is None and passes is None:
        raise click.UsageError("give a folder to write with -o, or passes to print with --passes")
    if out is not None and out.exists() and not overwrite:
        raise RingCompileError(f"'{out}' exists", hint="pass --overwrite to replace it")
    keep_weights = not no_weights and out is not None
    with _CONSOLE.status(f"loading {model}"):
        loaded = load_model(model, batch=batch, length=seq, dtype=dtype, weights=keep_weights)
    with _CONSOLE.status("capturing"):
        program = capture(loaded.module, loaded.args, loaded.kwargs, name=loaded.name)
        if overlap == HALVES:
            program = halved(
                program, lambda half: _captured_at(half, loaded, model, seq, dtype), batch, capacity
            )
    told = None if plan is None else read_plan(plan, program, mesh)
    starts = tuple(filter(None, (name.strip() for name in (stages or "").split(","))))
    if passes is not None:
        every = compiler.front_passes(
            mesh, order, gather_unknown, capacity, ring, tp_sequence,
            starts or (told.stages if told else ()), told.told("tp") if told else None,
        )
        click.echo(print_program(_run_passes(program, passes, every, mesh)))
        return
    seconds: dict[str, float] = {}
    observe = _observer(print_ir_after_all, seconds)
    options = {"model": model, "dtype": dtype, "batch": batch}
    with _CONSOLE.status("transforming"):
        made = compiler.transform(
            program, mesh, order=order, length=seq, gather_unknown=gather_unknown,
            capacity=capacity, ring=ring, tp_sequence=tp_sequence, stages=starts, plan=told,
            observe=observe, options=options,
            schedule=schedule_for(overlap, overlap_on, program, mesh, seq),
        )
        if verify_each:
            made.verify()
    with _CONSOLE.status(f"writing {mesh.world_size} programs"):
        assert out is not None
        made.save(out, overwrite=overwrite)
    if time_passes:
        for name, spent in seconds.items():
            click.echo(f"{name:16} {spent:8.3f} s", err=True)
    _print_summary(out, made, as_json)


def _captured_at(
    batch: int, loaded: LoadedModel, model: str, seq: int | None, dtype: str | None
) -> Program:
    """The same module over example inputs of another batch; weights are not loaded again."""
    other = load_model(model, batch=batch, length=seq, dtype=dtype, weights=":" in model)
    return capture(loaded.module, other.args, other.kwargs, name=loaded.name)


def _run_passes(
    program: Program, names: str, front: Sequence[Pass], mesh: Mesh
) -> Program:
    known: dict[str, Pass] = {step.name: step for step in (*front, *compiler.rank_passes(0, mesh))}
    for name in filter(None, (part.strip() for part in names.split(","))):
        if name not in known:
            raise RingCompileError(f"unknown pass '{name}'", hint=f"passes: {', '.join(known)}")
        program = Pipeline([known[name]]).run(program)
    return program


def _observer(
    print_each: bool, seconds: dict[str, float]
) -> Callable[[Pass, Program, float], None]:
    def observe(step: Pass, program: Program, spent: float) -> None:
        seconds[step.name] = seconds.get(step.name, 0.0) + spent
        if print_each:
            click.echo(print_program(program))

    return observe


def _print_summary(out: Path, made: compiler.ParallelProgram, as_json: bool) -> None:
    program = made.program
    assert program.sequence is not None
    sizes = [len(made.rank(rank).graph.nodes) for rank in range(made.world_size)]
    facts = {
        "out": str(out),
        "model": program.name,
        "parallel": str(made.mesh),
        "ranks": made.world_size,
        "order": program.sequence.order,
        "nodes": sizes,
        "notes": list(program.notes),
    }
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    click.echo(
        f"wrote {out}: {program.name}, {made.mesh}, {program.sequence.order}, "
        f"{made.world_size} programs of {max(sizes)} nodes"
    )
    for note in program.notes:
        click.echo(f"note: {note}")
    click.echo(f"next: ringcompile run {out}, ringcompile dump {out} --rank 0")


@cli.command()
@click.argument("model")
@_PARALLEL
@_ORDER
@_CAPACITY
@_RING
@_TP_SEQUENCE
@_DTYPE
@_BATCH
@_JSON
def check(
    model: str,
    parallel: str,
    order: str,
    capacity: str,
    ring: str,
    tp_sequence: bool,
    dtype: str | None,
    batch: int,
    as_json: bool,
) -> None:
    """Say layer by layer what would become of MODEL; reads no weights. Exit 1 if refused."""
    mesh = Mesh.parse(parallel)
    with _CONSOLE.status(f"checking {model}"):
        loaded = load_model(model, batch=batch, dtype=dtype, weights=":" in model)
        found = compiler.check(
            loaded.module, mesh, loaded.args, loaded.kwargs, order=order, capacity=capacity,
            ring=ring, tp_sequence=tp_sequence,
        )
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2))
    else:
        _print_report(found)
    if not found.supported:
        raise click.exceptions.Exit(1)


def _print_report(found: Report) -> None:
    console = Console()
    table = Table(title=f"{found.model} with {found.mesh}, order {found.order}")
    for column in ("layer", "line", "attention", "mask"):
        table.add_column(column)
    for row in found.attention:
        table.add_row(row.layer, row.line, row.form, row.mask)
    if found.attention:
        console.print(table)
    for text in found.notes:
        click.echo(f"note: {text}")
    for text in found.gathers:
        click.echo(f"gathered whole on every rank: {text}")
    for rank, expression in found.bytes_sent.items():
        click.echo(f"rank {rank} sends {expression} bytes a run")
    for text in found.refusals:
        click.echo(f"refused: {text}")
    click.echo("supported" if found.supported else "not supported")


@cli.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--rank", type=int, help="One rank's program (else what all have in common).")
@click.option("--format", "format_", type=click.Choice([*formats(), "plan"]),
              default="text",
              show_default=True)
@click.option("--after", metavar="PASS", help="As it was behind this pass.")
def dump(out: Path, rank: int | None, format_: str, after: str | None) -> None:
    """Print a program of the artifact OUT."""
    made = compiler.load(out)
    if format_ == "plan":
        click.echo(made.plan().to_text(), nl=False)
        return
    if after is not None:
        program = compiler.program_after(made, after, rank or 0)
    else:
        program = made.program if rank is None else made.rank(rank)
    click.echo(render(program, format_))


@cli.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--numerics", is_flag=True, help="Compare numbers with the single-device model.")
@click.option("--model", help="The model to compare with (else the one it was made from).")
@_JSON
def verify(out: Path, numerics: bool, model: str | None, as_json: bool) -> None:
    """Check the ranks of the artifact OUT against each other; exit 1 if they do not fit."""
    made = compiler.load(out)
    with _CONSOLE.status("verifying"):
        found = execution.verify(made, numerics=numerics, model=model)
    if as_json:
        click.echo(json.dumps(asdict(found), indent=2))
    else:
        click.echo(f"{out}: {found.ranks} ranks fit together, {found.transfers} transfers")
        for row in found.numerics:
            click.echo(
                f"length {row.length}: largest difference {row.difference:.2e} of the largest "
                f"output (allowed {row.allowed:.0e})"
            )
    if not found.passed:
        raise RingCompileError("the numbers differ from the single-device model")


@cli.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--nproc", type=click.IntRange(1), help="Number of local processes (world size).")
@click.option("--backend", type=click.Choice(["auto", *execution.BACKENDS]), default="auto",
              show_default=True)
@click.option("--inputs", type=click.Path(path_type=Path), help="Whole inputs, safetensors.")
@click.option("--outputs", type=click.Path(path_type=Path), help="Where to write whole outputs.")
@click.option("--seq", type=click.IntRange(1), default=128, show_default=True,
              help="Length of random inputs, where none are given.")
@click.option("--timeout", type=float, default=300.0, show_default=True, help="Seconds.")
@click.option("--join-timeout", type=float, default=120.0, show_default=True,
              help="Seconds to wait for all ranks, on all hosts, to be there.")
@click.option("--compile", "compiled", is_flag=True,
              help="torch.compile what is computed between communications.")
@_JSON
def run(
    out: Path,
    nproc: int | None,
    backend: str,
    inputs: Path | None,
    outputs: Path | None,
    seq: int,
    timeout: float,
    join_timeout: float,
    compiled: bool,
    as_json: bool,
) -> None:
    """Run the artifact OUT on local processes; under torchrun, join the job that is there."""
    found = execution.run_artifact(
        out, nproc=nproc, backend=backend, inputs=inputs, outputs=outputs, length=seq,
        timeout=timeout, join_timeout=join_timeout, compiler="inductor" if compiled else None,
    )
    if found is None:  # another rank of a torchrun job reports
        return
    if as_json:
        click.echo(json.dumps(asdict(found), indent=2))
        return
    click.echo(f"{found.ranks} ranks over {found.backend}, {found.seconds:.3f} s")
    for name, text in found.outputs.items():
        click.echo(f"  {name}: {text}")
    for rank, sent in enumerate(found.bytes_sent):
        click.echo(f"  rank {rank} sent {sent:,} bytes")


