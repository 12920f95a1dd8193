"""`ringcompile view`: one HTML file that shows what became of a model."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ringcompile.commands.options import Out, artifact_argument, complete_clusters, working
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
              help="The file to write. The default is OUT.html.")
@click.option("--cluster", default="h100x16", show_default=True, metavar="NAME|FILE",
              shell_complete=complete_clusters,
              help="The hardware that the timeline is simulated for.")
@click.option("--seq", type=click.IntRange(1), metavar="N",
              help="Sequence length for the bytes and times that are shown.")
@click.option("--trace", type=click.Path(path_type=Path), metavar="FILE",
              help="Also show the timeline that `ringcompile run OUT --trace FILE` measured.")
@click.option("--open", "opens", is_flag=True, help="Open the file in a browser.")
def view(
    out: Out, file: Path | None, cluster: str, seq: int | None, trace: Path | None, opens: bool
) -> None:
    """Write an HTML page that shows the programs of all ranks.

    It shows the model's blocks, the graph of each, the messages between ranks and a simulated
    timeline. Any browser opens it, without a network connection or a server.
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
