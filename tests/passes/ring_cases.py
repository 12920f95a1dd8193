"""Rings of causal, windowed and full attention, and what each rank needs, counted by position."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch.nn import functional as F

from ringcompile.capture.export import capture
from ringcompile.compiler import transform
from ringcompile.ir.program import Program
from ringcompile.ir.types import SequenceSplit
from ringcompile.ops.blocks import Band
from ringcompile.parallel_program import ParallelProgram
from tests.test_ops_across_the_sequence import H, Lambda

ORDERS = ("contiguous", "zigzag")
RANKS = range(2, 7)
ATTEND = "ringcompile.block_attention.default"
FOLD = "ringcompile.attend_merge.default"  # a block attention and the merge of its result
FINISH = "ringcompile.finish.default"
PACK = "ringcompile.pack.default"
SLICE = "aten.slice.Tensor"
BATCH, HEADS, DIM = 2, 3, H // 3
# One token of packed keys and values, of one attention.
TOKEN_BYTES = BATCH * HEADS * 2 * DIM * torch.float32.itemsize
NUM_ATTENTIONS = 2


def banded(band: Band) -> Callable[[torch.Tensor], torch.Tensor]:
    """Two attentions, one after the other, under a band."""

    def attend(x: torch.Tensor) -> torch.Tensor:
        heads = x.view(x.shape[0], x.shape[1], HEADS, DIM).transpose(1, 2)
        index = torch.arange(x.shape[1])
        apart = index[:, None] - index[None, :]
        mask = torch.ones_like(apart, dtype=torch.bool)
        if band.lower is not None:
            mask = mask & (apart >= band.lower)
        if band.upper is not None:
            mask = mask & (apart <= band.upper)
        out = F.scaled_dot_product_attention(heads, heads * 0.5, heads - 1, attn_mask=mask)
        return out.transpose(1, 2).reshape(x.shape)

    return lambda x: attend(attend(x) + x)


@cache
def captured(band: Band) -> tuple[Lambda, Program]:
    module = Lambda(banded(band)).eval()
    return module, capture(module, (torch.randn(BATCH, 17, H),))


@dataclass(frozen=True)
class Case:
    """A band on a ring; `length` is what is compiled for, None for all lengths."""

    band: Band
    ranks: int
    order: str
    length: int | None = None

    def __str__(self) -> str:
        return f"{self.band}, {self.ranks} {self.order}, {self.length or 'all lengths'}"

    @property
    def sequence(self) -> SequenceSplit:
        return SequenceSplit((("ring", self.ranks),), self.order)


@cache
def compiled(case: Case) -> ParallelProgram:
    program = captured(case.band)[1]
    return transform(program, f"ring={case.ranks}", order=case.order, length=case.length)


# Bands, and the lengths to compile for: chunks shorter and longer than the windows.
LENGTHS: dict[Band, tuple[int | None, ...]] = {
    Band(): (None,),
    Band(0): (None, 61),
    Band(0, 3): (None, 61),
    Band(0, 19): (24, 61),
    Band(-5, 5): (None, 24, 61),
    Band(-2, 9): (None, 24),
}
RINGS = {
    f"{band}, {order}, {length or 'all lengths'}": [
        Case(band, ranks, order, length) for ranks in RANKS
    ]
    for band, lengths in LENGTHS.items()
    for length in lengths
    for order in ORDERS
}
every_ring = pytest.mark.parametrize("ring", RINGS)


# -- what is needed, from positions ----------------------------------------------------------------


def chunks_of(case: Case, rank: int) -> list[int]:
    if case.order == "contiguous":
        return [rank]
    return [rank, 2 * case.ranks - 1 - rank]


def sees(band: Band, query: range, key: range) -> bool:
    """Whether any pair of positions is visible, by trying all."""
    return any(
        (band.lower is None or i - j >= band.lower) and (band.upper is None or i - j <= band.upper)
        for i in query
        for j in key
    )


@cache
def visible(band: Band, query: int, key: int, chunk: int | None) -> bool:
    """Of two chunks by index; of any length, if that is not known."""
    lengths = [chunk] if chunk is not None else range(1, 14)
    return any(
        sees(band, range(query * c, (query + 1) * c), range(key * c, (key + 1) * c))
        for c in lengths
    )


def known_chunk(case: Case) -> int | None:
    """The length of a chunk where the length is fixed: equal, and enough for all tokens."""
    if case.length is None:
        return None
    return -(-case.length // (len(chunks_of(case, 0)) * case.ranks))


@cache
def needed(case: Case, rank: int) -> set[tuple[int, int]]:
    """The (rank, slot) of every chunk that a rank does not hold and sees some of."""
    return {
        (owner, slot)
        for owner in range(case.ranks)
        for slot, key in enumerate(chunks_of(case, owner))
        if owner != rank
        and any(
            visible(case.band, query, key, known_chunk(case)) for query in chunks_of(case, rank)
        )
    }


def expected_bytes(case: Case, length: int) -> int:
    """All ranks together: one chunk of keys and values for every rank that sees it."""
    chunk = -(-length // (len(chunks_of(case, 0)) * case.ranks))
    received = sum(len(needed(case, rank)) for rank in range(case.ranks))
    return NUM_ATTENTIONS * received * chunk * TOKEN_BYTES
