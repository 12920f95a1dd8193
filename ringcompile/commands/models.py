"""`ringcompile models`: the small models that come with ringcompile."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from ringcompile.commands.options import JSON
from ringcompile.later import Later

if TYPE_CHECKING:
    from ringcompile.models import table
else:
    table = Later("ringcompile.models.table")


@click.command()
@JSON
def models(as_json: bool) -> None:
    """List the small models that come with ringcompile."""
    rows = {name: table.describe(name) for name in table.names()}
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    for name, text in rows.items():
        click.echo(f"{name:16} {text}")
