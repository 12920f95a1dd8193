"""What several commands have in common: options, tables, texts for sizes."""

from __future__ import annotations

import click
from rich.console import Console
from rich.table import Table

from ringcompile.capture.loaders import DTYPES
from ringcompile.cost.hardware import cluster_names
from ringcompile.passes.place import ORDERS, RINGS
from ringcompile.passes.regions import CAPACITIES

CONSOLE = Console(stderr=True)
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")
PARALLEL = click.option(
    "--parallel", required=True, metavar="SPEC",
    help="The parallel spec: axes and sizes, such as ring=4 or pp=2,ring=4,tp=2; outermost first."
)
ORDER = click.option(
    "--order", type=click.Choice(["auto", *ORDERS]), default="auto", show_default=True,
    help="Which positions a rank holds; auto is zigzag where all attention is causal.",
)
CAPACITY = click.option(
    "--capacity", type=click.Choice(CAPACITIES), default=CAPACITIES[0], show_default=True,
    help="Whose tokens count where experts have a capacity: all of them, or each rank's own.",
)
RING = click.option(
    "--ring", type=click.Choice(RINGS), default=RINGS[0], show_default=True,
    help="Keys and values rotate, or are gathered at once (short sequences).",
)
TP_SEQUENCE = click.option(
    "--tp-sequence", is_flag=True, help="Divide the sequence over tp between the layers it splits."
)
DTYPE = click.option("--dtype", type=click.Choice(DTYPES), help="Cast the model first.")
BATCH = click.option("--batch", type=click.IntRange(1), default=1, show_default=True)
CLUSTER = click.option(
    "--cluster", required=True, metavar="NAME|FILE",
    help=f"The hardware: {', '.join(cluster_names())}, or a file that `calibrate` wrote.",
)
EAGER = click.option(
    "--eager", is_flag=True,
    help="Count the host's time for each node (else, as with CUDA graphs, it is not waited for).",
)


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A table on standard output; what does not fit into the terminal is not cut."""
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(width=None if Console().is_terminal else 160).print(table)


def milliseconds(seconds: float) -> str:
    """`12.34 ms`."""
    return f"{seconds * 1e3:.4g} ms"


def gigabytes(num_bytes: float) -> str:
    """`6.44 GB`."""
    return f"{num_bytes / 1e9:.3g} GB"


def shares(parts: dict[str, float]) -> str:
    """`matmul 58 %, communication 31 %`: of their sum, small ones left out."""
    total = sum(parts.values()) or 1.0
    return ", ".join(f"{name} {part / total:.0%}" for name, part in parts.items()
                     if part / total >= 0.005)
