"""`ringcompile info`: what an artifact is, what goes in and comes out, and how to run it."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Any

import click

from ringcompile.commands.options import JSON, Out, artifact_argument, size_text
from ringcompile.later import Later

if TYPE_CHECKING:
    from ringcompile.commands import job
    from ringcompile.ir import communication, nodes
    from ringcompile.ir.types import TensorType
    from ringcompile.parallel_program import ParallelProgram
else:
    job = Later("ringcompile.commands.job")
    communication = Later("ringcompile.ir.communication")
    nodes = Later("ringcompile.ir.nodes")


@click.command()
@artifact_argument
@JSON
def info(out: Out, as_json: bool) -> None:
    """Print what the artifact OUT takes and returns.

    Also printed are the lengths and batches that it takes, the memory for weights, and the commands
    that run it.
    """
    facts = _facts(out, out.load())
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    click.echo(f"{facts['model']}, {facts['parallel']}, order {facts['order']}, "
               f"{facts['ranks']} {'rank' if facts['ranks'] == 1 else 'ranks'}")
    for word, values in (("input ", facts["inputs"]), ("output", facts["outputs"])):
        for name, type_ in values.items():
            click.echo(f"  {word} {name}: {type_}")
    click.echo(f"  length of the sequence: {facts['length']}")
    click.echo(f"  batch: {facts['batch']}")
    weights = facts["weight_bytes"]
    share = size_text(weights[0]) if len(set(weights)) == 1 else (
        f"{size_text(min(weights))} to {size_text(max(weights))}"
    )
    click.echo(f"  weights of a rank: {share}")
    for note in facts["notes"]:
        click.echo(f"note: {note}")
    for where, line in zip(("on this machine", "as a job"), facts["run"], strict=True):
        click.echo(f"run {where}: {line}")


def _facts(out: Out, made: ParallelProgram) -> dict[str, Any]:
    program, name = made.program, shlex.quote(str(out))
    assert program.sequence is not None
    last = made.rank(made.world_size - 1)
    outputs = zip(job.output_names(last), last.outputs, strict=True)
    return {
        "out": str(out),
        "model": program.name,
        "parallel": str(made.mesh),
        "order": program.sequence.order,
        "ranks": made.world_size,
        "inputs": {spec.name: _type(spec.type) for spec in program.inputs},
        "outputs": {label: _type(nodes.type_of(node)) for label, node in outputs},
        "length": _length(made),
        "batch": _batch(made),
        "weight_bytes": [communication.weight_bytes(rank) for rank in made.ranks()],
        "notes": list(made.notes),
        "options": made.options,
        "run": [
            f"ringcompile run {name}",
            f"torchrun --nproc-per-node {made.world_size} -m ringcompile run {name}",
        ],
    }


def _type(type_: TensorType) -> str:
    """`int64 [1, s]`: the whole tensor."""
    return f"{str(type_.dtype).removeprefix('torch.')} [{', '.join(map(str, type_.shape))}]"


def _batch(made: ParallelProgram) -> str:
    size, replicas = made.program.batch, made.mesh.size("dp")
    if not isinstance(size, int):
        return "any number of sequences" + (f" that divides by {replicas}" if replicas > 1 else "")
    copies = "" if replicas * made.mesh.size("pp") == 1 else ", or a multiple"
    return f"{size * replicas}{copies}"


def _length(made: ParallelProgram) -> str:
    fixed = made.program.lengths.get("s")
    if fixed is not None:
        return f"{fixed} tokens"
    low, high = made.program.length_range
    least = f"s, at least {low} token{'' if low == 1 else 's'}"
    return f"s, {low} to {high} tokens" if high is not None else least

