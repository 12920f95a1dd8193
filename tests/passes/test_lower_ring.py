"""Ring attention sends what is seen and no more, overlaps it, and computes every block once.

What is needed is counted from positions by a double loop here, not by the pass's own `Route`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import product as pairs
from typing import Any

import pytest
import torch
from torch import fx
from torch.nn import functional as F

from ringcompile.capture.export import capture
from ringcompile.compiler import ParallelProgram, transform
from ringcompile.ir.calls import Call
from ringcompile.ir.communication import SHIFT, WAIT, bytes_sent
from ringcompile.ir.expr import bind
from ringcompile.ir.program import Program
from ringcompile.ir.types import SequenceSplit
from ringcompile.ops.blocks import Band
from tests.support import difference, run
from tests.test_ops_across_the_sequence import H, Lambda

ORDERS = ("contiguous", "zigzag")
RANKS = range(2, 7)
ATTEND = "ringcompile.block_attention.default"
PACK = "ringcompile.pack.default"
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


@lru_cache
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
        return SequenceSplit("ring", self.ranks, self.order)

    def compiled(self) -> ParallelProgram:
        return transform(
            captured(self.band)[1], f"ring={self.ranks}", order=self.order, length=self.length
        )


@lru_cache
def compiled(case: Case) -> ParallelProgram:
    return case.compiled()


BANDS = (Band(), Band(0), Band(0, 3), Band(0, 19), Band(-5, 5), Band(-2, 9))
CASES = [
    Case(band, ranks, order, length)
    for band, ranks, order in pairs(BANDS, RANKS, ORDERS)
    for length in (None, 4 * 6, 61)
]
FEW = [case for case in CASES if case.ranks in (2, 5)]


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


@lru_cache
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


def needed(case: Case, rank: int) -> set[tuple[int, int]]:
    """The (rank, slot) of every chunk that a rank does not hold and sees some of."""
    return {
        (owner, slot)
        for owner in range(case.ranks)
        for slot, key in enumerate(chunks_of(case, owner))
        if owner != rank
        and any(visible(case.band, query, key, known_chunk(case)) for query in chunks_of(case, rank))
    }


def expected_bytes(case: Case, length: int) -> int:
    """All ranks together: one chunk of keys and values for every rank that sees it."""
    chunk = -(-length // (len(chunks_of(case, 0)) * case.ranks))
    received = sum(len(needed(case, rank)) for rank in range(case.ranks))
    return NUM_ATTENTIONS * received * chunk * TOKEN_BYTES


# -- bytes -----------------------------------------------------------------------------------------


def counted_bytes(parallel: ParallelProgram, length: int) -> list[int]:
    """What each rank sends, read off its graph."""
    assert parallel.program.sequence is not None
    known = parallel.program.sequence.bindings(length)
    return [int(bind(bytes_sent(program), known)) for program in parallel.ranks()]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_byte_too_many_stands_in_the_graphs(case: Case) -> None:
    for length in (24, 61, 7) if case.length is None else (case.length,):
        assert sum(counted_bytes(compiled(case), length)) == expected_bytes(case, length)


@pytest.mark.parametrize("case", FEW, ids=str)
def test_right_numbers_and_no_byte_too_many_sent(case: Case) -> None:
    module, parallel = captured(case.band)[0], compiled(case)
    for length in (24, 61, 7) if case.length is None else (case.length,):
        x = torch.randn(BATCH, length, H)
        result = run(parallel, (x,))
        assert difference(result.outputs, module(x)) < 1e-6
        assert result.bytes_sent == counted_bytes(parallel, length)
        assert sum(result.bytes_sent) == expected_bytes(case, length)


def test_causal_zigzag_sends_three_quarters_of_whole_blocks() -> None:
    """(R - 1) early chunks for each of R ranks, and R (R - 1) / 2 late ones, in units of n/2."""
    for ranks in RANKS:
        length = 12 * ranks
        found = sum(counted_bytes(compiled(Case(Band(0), ranks, "zigzag")), length))
        whole = sum(counted_bytes(compiled(Case(Band(), ranks, "zigzag")), length))
        assert found * 4 == whole * 3


# -- where transfers stand -------------------------------------------------------------------------


def nodes_of(program: Program, target: str) -> list[fx.Node]:
    return [node for node in program.graph.nodes if str(node.target) == target]


def received_by(case: Case, rank: int) -> dict[int, set[tuple[int, int]]]:
    """The chunks a rank takes in, by the direction they come from: 1 is from the rank before.

    On a ring every chunk goes as far down as its readers reach without a gap, and up to the rest;
    where all can be reached going down, they are.
    """
    found: dict[int, set[tuple[int, int]]] = {1: set(), -1: set()}
    for chunk in needed(case, rank):
        owner = chunk[0]
        distance = (rank - owner) % case.ranks
        readers = {d for d in range(1, case.ranks) if chunk in needed(case, (owner + d) % case.ranks)}
        down = next(d for d in range(case.ranks) if d + 1 not in readers)
        found[1 if distance <= down else -1].add(chunk)
    return found


def transfers_of(case: Case, rank: int) -> int:
    """How many transfers a rank starts for one attention: one a step and direction."""
    total = 0
    for way in (1, -1):
        before, after = (rank - way) % case.ranks, (rank + way) % case.ranks
        taken = {(way * (rank - c[0])) % case.ranks for c in received_by(case, rank)[way]}
        given = {(way * (after - c[0])) % case.ranks for c in received_by(case, after)[way]}
        assert before != rank
        total += len(taken | given)
    return total


@pytest.mark.parametrize("case", CASES, ids=str)
def test_number_of_transfers(case: Case) -> None:
    for rank, program in enumerate(compiled(case).ranks()):
        starts, waits = nodes_of(program, SHIFT), nodes_of(program, WAIT)
        assert len(starts) == len(waits) == NUM_ATTENTIONS * transfers_of(case, rank)
        assert all(start.kwargs["to"] is not None or start.kwargs["source"] is not None
                   for start in starts)


def transfers_by_formula(case: Case, rank: int) -> int:
    """Of causal attention: how often a rank meets its neighbours."""
    ranks = case.ranks
    if case.order == "contiguous":
        return min(rank + 1, ranks - 1)
    down = ranks - 1  # every early chunk goes all around
    up = ranks - 2 if rank == 0 else ranks - 1 - rank  # the last rank's late chunk goes down too
    return down + up


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("ranks", RANKS)
def test_number_of_transfers_of_causal_attention(ranks: int, order: str) -> None:
    case = Case(Band(0), ranks, order)
    for rank in range(ranks):
        assert transfers_of(case, rank) == transfers_by_formula(case, rank)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_transfers_are_between_neighbours(case: Case) -> None:
    for rank, program in enumerate(compiled(case).ranks()):
        for start in nodes_of(program, SHIFT):
            to, source = start.kwargs["to"], start.kwargs["source"]
            ways = {
                way
                for way in (1, -1)
                if to in (None, (rank + way) % case.ranks)
                and source in (None, (rank - way) % case.ranks)
            }
            assert ways, f"%{start.name} of rank {rank} goes {source} -> {to}"


def behind(node: fx.Node) -> set[fx.Node]:
    """The nodes that a tensor is a piece or a packed copy of, itself included."""
    found, queue = {node}, [node]
    while queue:
        at = queue.pop()
        if str(at.target) in (PACK, "aten.slice.Tensor"):
            for operand in at.all_input_nodes:
                found.add(operand)
                queue.append(operand)
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_is_passed_on_leaves_before_it_is_computed_with(case: Case) -> None:
    for program in compiled(case).ranks():
        order = {node: i for i, node in enumerate(program.graph.nodes)}
        for start in nodes_of(program, SHIFT):
            sent: Any = start.args[0]
            for attention in nodes_of(program, ATTEND):
                kv = set().union(*map(behind, Call(attention)["kv"]))
                if start.kwargs["to"] is not None and kv & behind(sent) & carriers(program):
                    assert order[start] < order[attention]


def carriers(program: Program) -> set[fx.Node]:
    """Keys and values of blocks: what arrived, and what is this rank's own."""
    own = {operand for pack in nodes_of(program, PACK) for operand in pack.all_input_nodes}
    return own | set(nodes_of(program, WAIT))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_wait_has_attention_to_hide_behind(case: Case) -> None:
    """Between a transfer's start and its wait stands attention, and no other wait."""
    for program in compiled(case).ranks():
        nodes = list(program.graph.nodes)
        for start in nodes_of(program, SHIFT):
            wait = next(user for user in start.users if str(user.target) == WAIT)
            between = nodes[nodes.index(start) + 1 : nodes.index(wait)]
            targets = [str(node.target) for node in between]
            assert ATTEND in targets
            assert targets[::-1].index(ATTEND) <= 2, "the wait follows at once"
            last = len(targets) - 1 - targets[::-1].index(ATTEND)
            assert WAIT not in targets[: last + 1]


# -- blocks ----------------------------------------------------------------------------------------


def computed(program: Program) -> Counter[tuple[int, int]]:
    """How often each pair of a query chunk and a key chunk is computed, over all attentions."""
    return Counter(
        pair
        for node in nodes_of(program, ATTEND)
        for pair in pairs(Call(node)["queries"], Call(node)["keys"])
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_visible_block_is_computed_once(case: Case) -> None:
    chunk = known_chunk(case)
    for rank, program in enumerate(compiled(case).ranks()):
        found, own = computed(program), chunks_of(case, rank)
        assert set(found.values()) == {NUM_ATTENTIONS}
        everything = pairs(own, range(case.sequence.num_chunks))
        seen = {pair for pair in everything if visible(case.band, *pair, chunk)}
        assert seen <= set(found)
        beyond = set(found) - seen - set(pairs(own, own))
        for query, key in beyond:  # in a call for several chunks, some of which the query sees
            assert any((query, other) in seen or (q, key) in seen
                       for q, other in pairs(own, range(case.sequence.num_chunks)))
        if case.band in (Band(), Band(0)):
            assert not beyond


def blocks_of(case: Case, rank: int) -> int:
    """Attention calls of one rank: its own block, and what arrives together from each other."""
    taken = received_by(case, rank)
    return 1 + sum(len({owner for owner, _ in taken[way]}) for way in (1, -1))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_number_of_blocks_and_merges(case: Case) -> None:
    for rank, program in enumerate(compiled(case).ranks()):
        blocks = NUM_ATTENTIONS * blocks_of(case, rank)
        assert len(nodes_of(program, ATTEND)) == blocks
        merges = nodes_of(program, "ringcompile.merge.default")
        assert len(merges) == blocks - NUM_ATTENTIONS
        assert len(nodes_of(program, "ringcompile.finish.default")) == NUM_ATTENTIONS


@pytest.mark.parametrize("ranks", RANKS)
def test_number_of_blocks_of_causal_attention(ranks: int) -> None:
    """Contiguous, rank r computes r + 1 blocks; zigzag evens the work out."""
    for rank in range(ranks):
        assert blocks_of(Case(Band(0), ranks, "contiguous"), rank) == rank + 1
        zigzag = Case(Band(0), ranks, "zigzag")
        assert blocks_of(zigzag, rank) == ranks + max(ranks - 2 - rank, 0)
        pairs_computed = computed(compiled(zigzag).rank(rank))
        assert sum(pairs_computed.values()) == NUM_ATTENTIONS * (2 * ranks + 2)


@pytest.mark.parametrize("window", [2, 5, 16])
def test_a_window_shorter_than_a_chunk_reaches_the_neighbour_only(window: int) -> None:
    case = Case(Band(0, window - 1), 16, "contiguous", length=16 * 16)
    parallel = compiled(case)
    for rank, program in enumerate(parallel.ranks()):
        starts = nodes_of(program, SHIFT)
        assert len(starts) == NUM_ATTENTIONS
        assert {start.kwargs["to"] for start in starts} == {rank + 1 if rank < 15 else None}
        assert {start.kwargs["source"] for start in starts} == {rank - 1 if rank else None}
        assert len(nodes_of(program, ATTEND)) == NUM_ATTENTIONS * (2 if rank else 1)
    x = torch.randn(BATCH, 16 * 16, H)
    result = run(parallel, (x,))
    assert difference(result.outputs, captured(case.band)[0](x)) < 1e-6
    assert result.bytes_sent == [*[NUM_ATTENTIONS * 16 * TOKEN_BYTES] * 15, 0]


def test_the_first_key_of_a_window_may_be_two_chunks_away() -> None:
    """A window of one more than a chunk reaches one position further."""
    for window, blocks in ((17, 2), (18, 3)):
        case = Case(Band(0, window - 1), 16, "contiguous", length=16 * 16)
        assert blocks_of(case, 9) == blocks
        assert len(nodes_of(compiled(case).rank(9), ATTEND)) == NUM_ATTENTIONS * blocks


def test_one_rank_sends_nothing() -> None:
    for order in ORDERS:
        program = compiled(Case(Band(0), 1, order)).rank(0)
        assert not nodes_of(program, SHIFT)
        assert len(nodes_of(program, ATTEND)) == NUM_ATTENTIONS
