"""How fast one row is multiplied with a weight, stored row by row and column by column, on a CPU.

    python -m benchmarks.weight_order [--threads N]

Weights are read from memory, as in a model: there are as many of each shape as make up 120 MB.
"""

import time
from collections.abc import Sequence

import click
import torch
import torch.nn.functional as F

from ringcompile.ops.memory_order import column_by_column

# out, in: projections of SmolLM2-135M, its head, and those of larger models.
SHAPES = (
    (192, 576), (576, 576), (1536, 576), (576, 1536), (49152, 576), (2048, 2048), (8192, 2048),
    (2048, 8192), (4096, 4096), (11008, 4096), (4096, 11008),
)
_BYTES = 120_000_000


def measure(shape: tuple[int, int], rounds: int, total: int = _BYTES) -> tuple[float, float]:
    """GB/s row by row and column by column: the best of `rounds` in which both take turns."""
    count = max(1, total // (4 * shape[0] * shape[1]))
    rows = [torch.randn(shape) for _ in range(count)]
    columns = [weight.t().contiguous().t() for weight in rows]
    x = torch.randn(1, shape[1])
    best = [float("inf")] * 2
    for _ in range(rounds):
        for side, weights in enumerate((rows, columns)):
            best[side] = min(best[side], _seconds(x, weights))
    read = count * 4 * shape[0] * shape[1] / 1e9
    return read / best[0], read / best[1]


def _seconds(x: torch.Tensor, weights: Sequence[torch.Tensor]) -> float:
    started = time.perf_counter()
    for weight in weights:
        F.linear(x, weight)
    return time.perf_counter() - started


def table(rounds: int, shapes: Sequence[tuple[int, int]] = SHAPES, total: int = _BYTES) -> str:
    """A Markdown table: of each shape both, and which of them sessions choose."""
    lines = ["| weight | row by row | column by column | chosen |", "|---|---|---|---|"]
    for shape in shapes:
        rows, columns = measure(shape, rounds, total)
        weight = torch.empty(shape)
        chosen = "rows" if column_by_column(weight) is weight else "columns"
        lines.append(f"| {shape[0]:,} x {shape[1]:,} | {rows:.3g} GB/s | {columns:.3g} GB/s | "
                     f"{chosen} |")
    return "\n".join(lines)


@click.command()
@click.option("--threads", default=1, show_default=True)
@click.option("--rounds", default=8, show_default=True)
def main(threads: int, rounds: int) -> None:
    """Measure every shape."""
    torch.set_num_threads(threads)
    with torch.no_grad():
        click.echo(table(rounds))


if __name__ == "__main__":
    main()
