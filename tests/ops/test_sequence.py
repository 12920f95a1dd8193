"""Positions and joining undo each other, for both orders, all lengths and numbers of ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ringcompile.ir.types import SequenceSplit
from ringcompile.ops.sequence import join, positions

ORDERS = ("contiguous", "zigzag")
RANKS = range(1, 6)
LENGTHS = range(1, 41)


def held(sequence: SequenceSplit) -> list[list[int]]:
    """The chunks of each rank."""
    return [[int(c) for c in sequence.chunks(rank)] for rank in range(sequence.num_ranks)]


def shares_of(x: torch.Tensor, sequence: SequenceSplit, dim: int) -> list[torch.Tensor]:
    length = x.shape[dim]
    chunk = sequence.local_length(length) // sequence.chunks_per_rank
    return [x.index_select(dim, positions(c, chunk, length)) for c in held(sequence)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("ranks", RANKS)
def test_join_undoes_positions(ranks: int, order: str) -> None:
    sequence = SequenceSplit((("ring", ranks),), order)
    for length in LENGTHS:
        x = torch.arange(2 * length * 3).reshape(2, length, 3)
        for dim, whole in enumerate((x.transpose(0, 1), x, x.transpose(1, 2))):
            shares = shares_of(whole, sequence, dim)
            assert torch.equal(join(shares, held(sequence), dim, length), whole)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("ranks", RANKS)
def test_every_position_is_held_once_and_padding_repeats_the_last(ranks: int, order: str) -> None:
    sequence = SequenceSplit((("ring", ranks),), order)
    for length in LENGTHS:
        local = sequence.local_length(length)
        shares = shares_of(torch.arange(length), sequence, 0)
        assert all(share.shape == (local,) for share in shares)
        found = sorted(torch.cat(shares).tolist())
        padding = ranks * local - length
        assert found == [*range(length), *[length - 1] * padding]
        assert padding < sequence.num_chunks, "no more padding than makes the chunks equal"
        assert all(share.tolist() == sorted(share.tolist()) for share in shares)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("ranks", RANKS)
def test_positions_undo_join(ranks: int, order: str) -> None:
    """What is joined and shared out again is what each rank held, but for its padding."""
    sequence = SequenceSplit((("ring", ranks),), order)
    for length in LENGTHS:
        chunk = sequence.local_length(length) // sequence.chunks_per_rank
        rows = [positions(c, chunk, length) for c in held(sequence)]
        shares = [row * 10 for row in rows]
        whole = join(shares, held(sequence), 0, length)
        assert all(torch.equal(whole[row], share) for row, share in zip(rows, shares, strict=True))


CHUNKS: dict[str, tuple[str, int, list[list[int]]]] = {
    "one rank": ("contiguous", 1, [[0]]),
    "contiguous": ("contiguous", 3, [[0], [1], [2]]),
    "one rank, zigzag": ("zigzag", 1, [[0, 1]]),
    "zigzag": ("zigzag", 3, [[0, 5], [1, 4], [2, 3]]),
}


@pytest.mark.parametrize("name", CHUNKS)
def test_chunks(name: str) -> None:
    order, ranks, expected = CHUNKS[name]
    assert held(SequenceSplit((("ring", ranks),), order)) == expected


POSITIONS: dict[str, tuple[list[int], int, int, list[int]]] = {
    "the first chunk": ([0], 3, 12, [0, 1, 2]),
    "a later one": ([2], 3, 12, [6, 7, 8]),
    "two": ([1, 3], 2, 8, [2, 3, 6, 7]),
    "padding at the end": ([1], 4, 6, [4, 5, 5, 5]),
    "padding only": ([3], 2, 3, [2, 2]),
    "nothing": ([0], 2, 0, [0, 0]),
}


@pytest.mark.parametrize("name", POSITIONS)
def test_positions(name: str) -> None:
    chunks, chunk, limit, expected = POSITIONS[name]
    found = positions(chunks, chunk, limit)
    assert found.tolist() == expected
    assert found.dtype == torch.int64


def test_a_share_too_few_or_too_many_is_not_joined() -> None:
    share: Any = torch.zeros(2)
    with pytest.raises(ValueError, match=r"shorter|longer"):
        join([share, share], [[0], [1], [2]], 0, 4)
    with pytest.raises(ValueError, match=r"shorter|longer"):
        join([share], [[0, 1, 2]], 0, 2)
