"""`ringcompile calibrate`: measures this machine and writes a hardware table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ringcompile.commands.options import complete_clusters
from ringcompile.errors import RingCompileError
from ringcompile.held import whole_file
from ringcompile.later import Later
from ringcompile.options import DTYPES

if TYPE_CHECKING:
    from ringcompile import calibration
else:
    calibration = Later("ringcompile.calibration")

_DEVICES = ("auto", "cpu", "cuda")


@click.command()
@click.option("-o", "--out", type=click.Path(path_type=Path),
              help="The file to write. By default the table is printed.")
@click.option("--device", type=click.Choice(_DEVICES), default="auto", show_default=True,
              help="The device to measure. auto: cuda if there is a GPU, otherwise cpu.")
@click.option("--dtype", type=click.Choice(DTYPES), help="The dtype of the measured ops. By "
              "default float16 on a GPU and float32 on a CPU.")
@click.option("--base", metavar="NAME|FILE", shell_complete=complete_clusters,
              help="A cluster whose figures are used for everything that is not measured.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, metavar="N",
              help="Number of threads of a rank on a CPU.")
@click.option("--ranks", type=click.IntRange(1), metavar="N",
              help="Number of ranks between which links are measured. By default 2, or the number "
              "of GPUs.")
@click.option("--passes", type=click.IntRange(1), metavar="N",
              help="Number of repetitions, of which the median is taken. By default 1 on a GPU; on "
              "a CPU, which other programs may be using, up to 3 that begin within half a minute.")
@click.option("--quick", is_flag=True,
              help="A trial run with small sizes. Do not use its numbers.")
def calibrate(
    out: Path | None,
    device: str,
    dtype: str | None,
    base: str | None,
    threads: int,
    ranks: int | None,
    passes: int | None,
    quick: bool,
) -> None:
    """Measure this machine and write a hardware table.

    Kernels, copies, launches and links are measured. Pass the file to other commands as
    --cluster FILE. With --base, measured figures replace those of the base, and all others are
    copied from it.
    """
    found = calibration.measure(device, dtype, base, threads, ranks, passes, quick)
    text = calibration.to_text(found.table)
    if out is None:
        click.echo(text)
        return
    try:
        with whole_file(out) as partial:
            partial.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise RingCompileError(f"cannot write '{out}': {error}") from None
    click.echo(f"wrote {out}: {found.about}")
