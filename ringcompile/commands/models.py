"""`ringcompile models`: the zoo."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from ringcompile.commands.options import JSON
from ringcompile.later import Later

if TYPE_CHECKING:
    from ringcompile.models import zoo
else:
    zoo = Later("ringcompile.models.zoo")


@click.command()
@JSON
def models(as_json: bool) -> None:
    """List the zoo."""
    rows = {name: zoo.describe(name) for name in zoo.names()}
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    for name, text in rows.items():
        click.echo(f"{name:16} {text}")
