"""`ringcompile verify`: an artifact's ranks against each other and against the model."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ringcompile.commands.options import JSON, Out, artifact_argument, working
from ringcompile.errors import RingCompileError
from ringcompile.later import Later
from ringcompile.options import TRIES

if TYPE_CHECKING:
    from ringcompile import execution
else:
    execution = Later("ringcompile.execution")


@click.command()
@artifact_argument
@click.option("--numerics", is_flag=True,
              help="Also compare outputs with those of the model on one device.")
@click.option("--model", metavar="MODEL",
              help="The model to compare with. By default the one that the artifact was made from, "
              "or the single-device program that the artifact contains.")
@click.option("--seq", type=click.IntRange(1), metavar="N",
              help="Compare outputs for this sequence length only.")
@click.option("--inputs", type=click.Path(path_type=Path),
              help="Compare outputs for the inputs in this file only (.safetensors, .pt or .npy).")
@click.option("--tries", type=click.IntRange(1), default=TRIES, show_default=True, metavar="N",
              help="Number of random inputs for each length.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, metavar="N",
              help="Seed of the first random inputs. Each reported difference names its seed.")
@JSON
def verify(
    out: Out,
    numerics: bool,
    model: str | None,
    seq: int | None,
    inputs: Path | None,
    tries: int,
    seed: int,
    as_json: bool,
) -> None:
    """Check that the programs of all ranks fit together.

    With --numerics, --seq or --inputs, outputs are also compared with the model's. By default this
    takes random inputs, which cover the vocabulary, masks, and lengths around the thresholds in the
    model's code. The exit code is 1 if a check fails.
    """
    made = out.load()
    with working("verifying"):
        found = execution.verify(
            made, numerics=numerics, model=model, seq=seq, inputs=inputs, tries=tries, seed=seed
        )
    if as_json:
        click.echo(json.dumps(asdict(found), indent=2))
    else:
        _print(out, found)
    if not found.passed:
        raise RingCompileError(
            f"the numbers differ from the single-device model: {found.wrong}",
            hint="the artifact is damaged, or the compiler is at fault: `ringcompile transform` "
            "again, and if that does not help, report it with this message",
        )


def _print(out: Out, found: execution.Verification) -> None:
    click.echo(f"{out}: {found.ranks} ranks fit together, {found.transfers} transfers")
    for row in found.numerics:
        about = f"length {row.length}, seed {row.seed}" if row.length else ""
        click.echo(
            f"{', '.join(filter(None, [about, row.inputs]))}: largest difference "
            f"{row.difference:.2e} of its row (allowed {row.allowed:.0e})"
        )
    for note in found.notes:
        click.echo(f"note: {note}")
    if found.numerics and found.passed:
        click.echo("the outputs agree with those of the single-device model")
