"""The kernel calls of an attention op: their rows, their columns, and the visible pairs.

The cases are those of `ops/attention.py`; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ringcompile.ops.blocks import Band, Piece, is_diagonal, pieces, rise

_NO_LIMIT = 2**62
_Seen = tuple[tuple[Piece, str], ...]


@dataclass(frozen=True)
class KernelCall:
    """One kernel call.

    Attributes:
        kind: "attention", "attention_causal" or "attention_masked".
        rows, columns: the numbers of queries and keys.
        visible: the number of (query, key) pairs inside the band.
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
) -> list[KernelCall]:
    """The kernel calls of attention over a block of keys.

    Args:
        queries: the chunks that the rows belong to, as for `block_attention`.
        keys: the chunks that the columns belong to.
        num_rows: the number of queries.
        num_columns: the number of keys.
        chunk: the length of a chunk.
        limit: the true length; positions from here on are padding.
        band: the range of q - k that is visible.
        masked: whether there are masks besides the band.
    """
    rows = pieces(queries, chunk, _NO_LIMIT, num_rows)
    columns = pieces(keys, chunk, limit, num_columns)
    if band.is_causal and not masked:
        if queries == keys and queries is not None:
            columns = rows
        if rows == columns and rise(rows) and num_rows == num_columns:
            scores = num_rows * (num_rows + 1) // 2
            return [KernelCall("attention_causal", num_rows, num_rows, scores)]
    made: list[KernelCall] = []
    added: list[KernelCall] = []
    last: _Seen = ()
    for row in rows:
        seen = _seen(row, columns, band)
        own = [column for column, relation in seen if relation == "partial"]
        if len(own) == 1 and not masked and is_diagonal(row, own[0], band):
            below = row.length * (row.length + 1) // 2
            causal = KernelCall("attention_causal", row.length, row.length, below)
            seen = tuple(each for each in seen if each[1] == "full")
            if not seen:
                made.append(causal)
                last = ((own[0], "partial"),)
                continue
            added.append(causal)
        _join(made, row, seen, last, band, masked)
        last = seen
    return made + added


def _join(
    made: list[KernelCall], row: Piece, seen: _Seen, last: _Seen, band: Band, masked: bool
) -> None:
    """Add a run of rows to the last call if they see the same in full, or make a call of it."""
    partial = any(relation == "partial" for _, relation in seen)
    kind = "attention_masked" if partial or masked else "attention"
    num_seen = sum(column.length for column, _ in seen)
    visible = sum(_visible(row, column, band) for column, _ in seen)
    if made and seen == last and not partial:  # they see the same: one call
        made[-1] = KernelCall(
            kind, made[-1].rows + row.length, num_seen, made[-1].visible + visible
        )
    else:
        made.append(KernelCall(kind, row.length, num_seen, visible))


def _seen(row: Piece, columns: Sequence[Piece], band: Band) -> _Seen:
    relations = (
        (column, band.relation(row.start - (column.start + column.length - 1),
                               row.start + row.length - 1 - column.start))
        for column in columns
    )
    return tuple((column, relation) for column, relation in relations if relation != "empty")


def _visible(row: Piece, column: Piece, band: Band) -> int:
    """The number of pairs i, j with lower <= (row.start + i) - (column.start + j) <= upper."""
    apart = row.start - column.start
    below = row.length * column.length
    if band.lower is not None:
        below -= _closer(row.length, column.length, band.lower - apart)
    if band.upper is None:
        return below
    return below - (row.length * column.length
                    - _closer(row.length, column.length, band.upper - apart + 1))


def _closer(rows: int, columns: int, distance: int) -> int:
    """The number of pairs with i - j < distance, for i < rows and j < columns."""
    # Row i has the columns j > i - distance, so min(columns, columns - 1 - (i - distance)) of them.
    full = min(max(distance, 0), rows)  # rows i < distance see all columns j >= 0
    first, last = max(distance, 0), min(rows, columns + distance - 1)
    shrinking = max(last - first, 0)
    top = columns - 1 - (first - distance)
    return full * columns + shrinking * top - shrinking * (shrinking - 1) // 2
