"""`ringcompile verify`: an artifact's ranks against each other and against the model."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ringcompile.commands.options import CONSOLE, JSON
from ringcompile.errors import RingCompileError
from ringcompile.later import Later

if TYPE_CHECKING:
    from ringcompile import compiler, execution
else:
    compiler = Later("ringcompile.compiler")
    execution = Later("ringcompile.execution")


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--numerics", is_flag=True, help="Compare numbers with the single-device model.")
@click.option("--model", help="The model to compare with (else the one it was made from).")
@JSON
def verify(out: Path, numerics: bool, model: str | None, as_json: bool) -> None:
    """Check the ranks of the artifact OUT against each other; exit 1 if they do not fit."""
    made = compiler.load(out)
    with CONSOLE.status("verifying"):
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
