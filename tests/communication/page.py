"""docs/communication.md, from the rows."""

from __future__ import annotations

from pathlib import Path

from tests.communication.count import LENGTH, numbers
from tests.communication.many import MANY, TOKENS
from tests.communication.rows import LEGEND, ROWS, Row

PAGE = Path(__file__).parents[2] / "docs" / "communication.md"
_INTRO = f"""# What ranks send

The bytes that one rank sends in one run, by strategy. The formulas are derived by hand from
what a strategy does (`tests/communication/rows.py`). Tests compare them with the bytes counted in
the graph of every rank, as symbolic expressions, and with what a run of all ranks in one process
sends, for lengths that divide evenly over the ranks and for others. A collective is counted as the
least that any algorithm has to send: a gather sends a rank's share to all others, a reduce-scatter
and an all-to-all keep a rank's own part, an all-reduce is a reduce-scatter and a gather.

The last column is an example: the smallest and largest rank's bytes of the model, for {LENGTH}
tokens. Written by `python -m tests.communication --write`.
"""
_MANY = f"""## Many ranks in tiles

The bytes that the busiest rank sends, read off the emitted programs for {TOKENS:,} tokens on each
rank. In tiles of as many queries as keys, they grow with the square root of the number of ranks.
Queries and results of W ranks come to `(d*b + 4*(d + 1)) / (2*d*b) * H/G * (W - 1)` blocks of keys
and values, because results travel in float32: 1.5 `H/G` for each rank in float16, 1 in float32. So
tiles pay least where query heads share keys, as in `llama-tiny`.
`python -m tests.communication --many` reads them anew.

| model | in a ring | bytes | in tiles | bytes | of the ring's |
|---|---|---|---|---|---|
"""


def many() -> str:
    """The section about many ranks."""
    lines = (
        f"| {row.model} | `{row.ring}` | {row.sent[0]:,} | `{row.tiles}` | {row.sent[1]:,} | "
        f"{row.sent[1] / row.sent[0]:.0%} |"
        for row in MANY
    )
    return _MANY + "\n".join(lines)


def page() -> str:
    """The whole text."""
    symbols = "\n".join(f"- `{name}`: {text}" for name, text in LEGEND.items())
    lines = [
        "| strategy | bytes that a rank sends | because | example |",
        "|---|---|---|---|",
        *(_line(row) for row in ROWS),
    ]
    return f"{_INTRO}\n" + "\n".join(lines) + f"\n\n{many()}\n\n## Symbols\n\n{symbols}\n"


def _line(row: Row) -> str:
    sent = numbers(row, LENGTH)
    spread = f"{min(sent):,}" if min(sent) == max(sent) else f"{min(sent):,} to {max(sent):,}"
    example = f"{row.model}, {row.parallel}: {spread}"
    return f"| {row.name} | {_formula(row)} | {row.why} | {example} |"


def _formula(row: Row) -> str:
    return "<br>".join(
        f"`{formula}`" + (f" where `{when}`" if when else "")
        for formula, when in row.terms
    )
