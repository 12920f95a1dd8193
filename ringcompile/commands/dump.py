"""`ringcompile dump`: a program of an artifact, to read."""

from __future__ import annotations

from pathlib import Path

import click

from ringcompile import compiler
from ringcompile.dump import formats, render


@click.command()
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
