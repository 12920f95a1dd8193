"""The kernels behind an attention op: which rows go over which columns, and what they see.

The same cases as in `ops/attention.py`; a test holds both against each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ringcompile.ops.blocks import Band, Piece, pieces

_NO_LIMIT = 2**62


@dataclass(frozen=True)
class Block:
    """One kernel call.

    Attributes:
        kind: "attention", "attention_causal" or "attention_masked".
        rows, columns: queries and keys that it goes over.
        visible: pairs of them that the band lets through.
    """

    kind: str
    rows: int
    columns: int
    visible: int


def blocks(
    queries: Sequence[int] | None,
    keys: Sequence[int] | None,
    num_rows: int,
    num_columns: int,
    *,
    chunk: int,
    limit: int,
    band: Band,
    masked: bool,
) -> list[Block]:
    """The kernel calls of an attention over a block.

    Args:
        queries: which chunks the rows are, as for `block_attention`.
        keys: which chunks the columns are.
        num_rows: how many queries there are.
        num_columns: how many keys.
        chunk: length of a chunk.
        limit: positions from here on are padding.
        band: what queries see, by position.
        masked: whether there are masks besides.
    """
    rows = pieces(queries, chunk, _NO_LIMIT, num_rows)
    columns = pieces(keys, chunk, limit, num_columns)
    if band.is_causal and not masked:
        if queries == keys and queries is not None:
            columns = rows
        if rows == columns and num_rows == num_columns:
            return [Block("attention_causal", num_rows, num_rows, num_rows * (num_rows + 1) // 2)]
    made: list[Block] = []
    last: tuple[tuple[Piece, str], ...] = ()
    for row in rows:
        seen = _seen(row, columns, band)
        partial = any(relation == "partial" for _, relation in seen)
        kind = "attention_masked" if partial or masked else "attention"
        num_seen = sum(column.length for column, _ in seen)
        visible = sum(_visible(row, column, band) for column, _ in seen)
        if made and seen == last and not partial:  # they see the same: one call
            made[-1] = Block(
                kind, made[-1].rows + row.length, num_seen, made[-1].visible + visible
            )
        else:
            made.append(Block(kind, row.length, num_seen, visible))
        last = seen
    return made


def _seen(
    row: Piece, columns: Sequence[Piece], band: Band
) -> tuple[tuple[Piece, str], ...]:
    relations = (
        (column, band.relation(row.start - (column.start + column.length - 1),
                               row.start + row.length - 1 - column.start))
        for column in columns
    )
    return tuple((column, relation) for column, relation in relations if relation != "empty")


def _visible(row: Piece, column: Piece, band: Band) -> int:
    """Pairs i, j with lower <= (row.start + i) - (column.start + j) <= upper."""
    apart = row.start - column.start
    below = row.length * column.length
    if band.lower is not None:
        below -= _closer(row.length, column.length, band.lower - apart)
    if band.upper is None:
        return below
    return below - (row.length * column.length
                    - _closer(row.length, column.length, band.upper - apart + 1))


def _closer(rows: int, columns: int, distance: int) -> int:
    """Pairs with i - j < distance, for i below rows and j below columns."""
    # Row i has the columns j > i - distance, so min(columns, columns - 1 - (i - distance)) of them.
    full = min(max(distance, 0), rows)  # rows i < distance see all columns j >= 0
    first, last = max(distance, 0), min(rows, columns + distance - 1)
    shrinking = max(last - first, 0)
    top = columns - 1 - (first - distance)
    return full * columns + shrinking * top - shrinking * (shrinking - 1) // 2
