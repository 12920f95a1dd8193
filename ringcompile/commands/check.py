"""`ringcompile check`: what would become of a model, layer by layer."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table

from ringcompile.commands.options import BATCH, CONSOLE, DTYPE, JSON, PARALLEL, compile_options
from ringcompile.later import Later
from ringcompile.mesh import Mesh
from ringcompile.options import Options

if TYPE_CHECKING:
    from ringcompile import compiler
    from ringcompile.capture import loaders
    from ringcompile.dump.report import Report
else:
    compiler = Later("ringcompile.compiler")
    loaders = Later("ringcompile.capture.loaders")


@click.command()
@click.argument("model")
@PARALLEL
@compile_options
@DTYPE
@BATCH
@JSON
def check(
    model: str,
    parallel: str,
    dtype: str | None,
    batch: int,
    as_json: bool,
    options: Options,
) -> None:
    """Say layer by layer what would become of MODEL; reads no weights. Exit 1 if refused."""
    mesh = Mesh.parse(parallel)
    with CONSOLE.status(f"checking {model}"):
        loaded = loaders.load_model(
            model, batch=batch, length=options.length, dtype=dtype, weights=":" in model
        )
        found = compiler.check(
            loaded.module, mesh, loaded.args, loaded.kwargs, **options.given()
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
