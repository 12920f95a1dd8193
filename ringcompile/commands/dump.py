"""`ringcompile dump`: a program of an artifact, to read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ringcompile.commands.options import Out, artifact_argument
from ringcompile.later import Later
from ringcompile.options import FORMATS

if TYPE_CHECKING:
    from ringcompile import compiler, stages
    from ringcompile import dump as dumps
    from ringcompile import view as viewer
    from ringcompile.dump import differences
else:
    differences = Later("ringcompile.dump.differences")
    stages = Later("ringcompile.stages")
    compiler = Later("ringcompile.compiler")
    dumps = Later("ringcompile.dump")
    viewer = Later("ringcompile.view")


@click.command()
@artifact_argument
@click.option("--rank", type=int, metavar="N",
              help="Print the program of rank N. By default: the program that all ranks share.")
@click.option("--format", "format_", type=click.Choice([*FORMATS, "html", "plan"]),
              default="text", show_default=True,
              help="text, python: to read. json, dot, graphml: for other tools. html: the page of "
              "`ringcompile view`. plan: the axes that split each weight, for `transform --plan`.")
@click.option("--after", metavar="PASS", help="Print the program as it was after this pass.")
@click.option("--cached", is_flag=True,
              help="Print the program that computes new tokens from a KV cache.")
@click.option("--diff", metavar="PASS", help="Print only what this pass changed.")
@click.option("--layer", metavar="NAME",
              help="Print only the lines of this layer, for example model.layers.3.")
def dump(
    out: Out,
    rank: int | None,
    format_: str,
    after: str | None,
    cached: bool,
    diff: str | None,
    layer: str | None,
) -> None:
    """Print a program of the artifact OUT. The formats html and plan cover all ranks."""
    if cached and after is not None:
        raise click.UsageError("--cached and --after cannot be combined")
    if format_ != "text" and (diff is not None or layer is not None):
        raise click.UsageError("--diff and --layer can only print text")
    made = out.load()
    if cached:
        made = made.with_cache()
    if format_ == "plan":
        click.echo(made.plan().to_text(), nl=False)
        return
    if format_ == "html":
        click.echo(viewer.page(made), nl=False)
        return
    if diff is not None:
        click.echo(differences.difference(*stages.around(made, diff, rank or 0)))
        return
    if after is not None:
        program = compiler.program_after(made, after, rank or 0)
    else:
        program = made.program if rank is None else made.rank(rank)
    if layer is not None:
        click.echo(differences.layer_text(program, layer))
        return
    click.echo(dumps.render(program, format_))
