"""`ringcompile calibrate`: measures this machine and writes a hardware table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

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
@click.option("-o", "--out", type=click.Path(path_type=Path), help="File to write (else print).")
@click.option("--device", type=click.Choice(_DEVICES), default="auto", show_default=True)
@click.option("--dtype", type=click.Choice(DTYPES),
              help="Of what is measured; by default float16 on a GPU, float32 on a CPU.")
@click.option("--base", metavar="CLUSTER",
              help="A cluster or file to take over what is not measured from.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True,
              help="Threads of a rank, on a CPU.")
@click.option("--ranks", type=click.IntRange(1),
              help="Ranks to measure links between: by default 2, or the number of GPUs.")
@click.option("--passes", type=click.IntRange(1),
              help="How often all is measured; the median counts. By default 3 times on a CPU, "
              "which others may use as well, and once on a GPU.")
@click.option("--quick", is_flag=True, help="A dry run on small sizes; the numbers are no good.")
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
    """Measure kernels, copies, launches and links of this machine; write a hardware table.

    The file is a cluster for `plan` and `simulate`: --cluster FILE. With --base, what was measured
    replaces the base's figures, field by field, and all others stay as they are marked there.
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
