"""`ringcompile dump`: a program of an artifact, to read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ringcompile.later import Later
from ringcompile.options import FORMATS

if TYPE_CHECKING:
    from ringcompile import compiler
    from ringcompile import dump as dumps
    from ringcompile import view as viewer
else:
    compiler = Later("ringcompile.compiler")
    dumps = Later("ringcompile.dump")
    viewer = Later("ringcompile.view")


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--rank", type=int, help="One rank's program (else what all have in common).")
@click.option("--format", "format_", type=click.Choice([*FORMATS, "html", "plan"]),
              default="text",
              show_default=True)
@click.option("--after", metavar="PASS", help="As it was behind this pass.")
def dump(out: Path, rank: int | None, format_: str, after: str | None) -> None:
    """Print a program of the artifact OUT; the formats html and plan are of all its ranks."""
    made = compiler.load(out)
    if format_ == "plan":
        click.echo(made.plan().to_text(), nl=False)
        return
    if format_ == "html":
        click.echo(viewer.page(made), nl=False)
        return
    if after is not None:
        program = compiler.program_after(made, after, rank or 0)
    else:
        program = made.program if rank is None else made.rank(rank)
    click.echo(dumps.render(program, format_))
