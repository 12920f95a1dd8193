"""`ringcompile view`: one HTML file that shows what became of a model."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ringcompile.commands.options import Out, artifact_argument, working
from ringcompile.errors import RingCompileError
from ringcompile.held import whole_file
from ringcompile.later import Later

if TYPE_CHECKING:
    from ringcompile import view as viewer
    from ringcompile.commands import tensor_files
else:
    viewer = Later("ringcompile.view")
    tensor_files = Later("ringcompile.commands.tensor_files")


@click.command()
@artifact_argument
@click.option("-o", "--html", "file", type=click.Path(path_type=Path),
              help="The file to write; by default named as OUT, with .html.")
@click.option("--cluster", default="h100x16", show_default=True, metavar="NAME|FILE",
              help="Whose tables the timeline is simulated with.")
@click.option("--seq", type=click.IntRange(1), help="Tokens of a sequence, for bytes and times.")
@click.option("--trace", type=click.Path(path_type=Path), metavar="FILE",
              help="Show what `run OUT --trace FILE` measured above the simulated timeline.")
@click.option("--open", "opens", is_flag=True, help="Open it in a browser.")
def view(
    out: Out, file: Path | None, cluster: str, seq: int | None, trace: Path | None, opens: bool
) -> None:
    """Write an HTML file with the programs of all ranks of OUT: blocks, graphs, messages, times.

    It needs no network and no server: open it in any browser.
    """
    made = out.load()
    file = file or out.path.with_name(f"{out.path.name}.html")
    tensor_files.check_place(file)
    with working(f"drawing {made.world_size} ranks"):
        text = viewer.page(made, cluster, seq, trace)
    try:
        with whole_file(file) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RingCompileError(f"cannot write '{file}': {error}") from None
    click.echo(f"wrote {file}: {len(text) / 1e6:.2g} MB; open it in a browser")
    if opens:
        webbrowser.open(file.absolute().as_uri())
