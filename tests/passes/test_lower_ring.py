"""Ring attention sends what is seen and no more, overlaps it, and computes every block once.

What is needed is counted from positions by a double loop here, not by the pass's own `Route`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import product as pairs

import pytest
import torch
from torch import fx

from ringcompile.ir.calls import Call
from ringcompile.ir.communication import SHIFT, WAIT, bytes_sent
from ringcompile.ir.expr import bind
from ringcompile.ir.program import Program
from ringcompile.ops.blocks import Band
from ringcompile.parallel_program import ParallelProgram
from ringcompile.passes.rank.ring_routes import reached
from tests.passes.ring_cases import (
    ATTEND,
    BATCH,
    FINISH,
    FOLD,
    NUM_ATTENTIONS,
    ORDERS,
    PACK,
    RANKS,
    RINGS,
    SLICE,
    TOKEN_BYTES,
    Case,
    captured,
    chunks_of,
    compiled,
    every_ring,
    expected_bytes,
    known_chunk,
    needed,
    visible,
)
from tests.support import difference, run
from tests.test_ops_across_the_sequence import H

# -- bytes -----------------------------------------------------------------------------------------


def counted_bytes(parallel: ParallelProgram, length: int) -> list[int]:
    """What each rank sends, read off its graph."""
    assert parallel.program.sequence is not None
    known = {**parallel.program.sequence.bindings({"s": length}), "b": BATCH}
    return [int(bind(bytes_sent(program), known)) for program in parallel.ranks()]


def lengths_of(case: Case) -> tuple[int, ...]:
    """Lengths to run: one that divides, one that does not, fewer tokens than chunks."""
    return (24, 61, 7) if case.length is None else (case.length,)


@every_ring
def test_no_byte_too_many_stands_in_the_graphs(ring: str) -> None:
    for case in RINGS[ring]:
        for length in lengths_of(case):
            found = sum(counted_bytes(compiled(case), length))
            assert found == expected_bytes(case, length), str(case)


@every_ring
def test_right_numbers_and_no_byte_too_many_sent(ring: str) -> None:
    for case in RINGS[ring]:
        module, parallel = captured(case.band)[0], compiled(case)
        for length in lengths_of(case):
            x = torch.randn(BATCH, length, H)
            result = run(parallel, (x,))
            assert difference(result.outputs, module(x)) < 1e-6, str(case)
            assert result.bytes_sent == counted_bytes(parallel, length), str(case)


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


def attentions_of(program: Program) -> list[fx.Node]:
    return [node for node in program.graph.nodes if str(node.target) in (ATTEND, FOLD)]


def given_by(case: Case, rank: int) -> dict[int, list[int]]:
    """The chunks that a rank needs of each other one."""
    found: dict[int, list[int]] = {}
    for owner, slot in sorted(needed(case, rank)):
        found.setdefault(owner, []).append(chunks_of(case, owner)[slot])
    return found


def rank_programs(ring: str) -> Iterator[tuple[Case, int, Program]]:
    """Every rank of every size of a ring."""
    for case in RINGS[ring]:
        for rank, program in enumerate(compiled(case).ranks()):
            yield case, rank, program


def by_attention(program: Program) -> list[list[fx.Node]]:
    """The transfers of each attention, in the order of their starts."""
    found: dict[str, list[fx.Node]] = {}
    for start in nodes_of(program, SHIFT):
        found.setdefault(str(start.kwargs["of"]), []).append(start)
    return list(found.values())


@every_ring
def test_each_rank_sends_its_own_chunks_to_those_that_see_them(ring: str) -> None:
    for case, rank, program in rank_programs(ring):
        others = [other for other in range(case.ranks) if other != rank]
        takes = given_by(case, rank)
        sends = {other: given_by(case, other).get(rank, []) for other in others}
        for starts in by_attention(program):
            assert all(start.kwargs["to"] != rank != start.kwargs["source"] for start in starts)
            for end, chunks, expected in (("source", "takes", takes), ("to", "sends", sends)):
                found = [s.kwargs for s in starts if s.kwargs[end] is not None]
                assert len({s[end] for s in found}) == len(found), (case, rank)
                assert {s[end]: s[chunks] for s in found} == {
                    other: wanted for other, wanted in expected.items() if wanted
                }, (case, rank)


def blocks_behind(node: fx.Node) -> set[fx.Node]:
    """What arrived, or this rank's own keys or values, of which a tensor is a piece or a copy."""
    if str(node.target) in (PACK, SLICE):
        return set().union(*map(blocks_behind, node.all_input_nodes))
    return {node}


@every_ring
def test_no_rank_passes_on_what_it_got(ring: str) -> None:
    for case, rank, program in rank_programs(ring):
        for start in nodes_of(program, SHIFT):
            sent = blocks_behind(start.args[0])  # type: ignore[arg-type]
            assert not [node for node in sent if str(node.target) == WAIT], (case, rank, start)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("ranks", RANKS)
def test_no_rank_of_causal_attention_has_more_turns_than_peers(ranks: int, order: str) -> None:
    for program in compiled(Case(Band(0), ranks, order)).ranks():
        assert all(len(starts) < ranks for starts in by_attention(program))


@pytest.mark.parametrize("ranks", [8, 16])
def test_messages_of_a_turn_all_stay_on_their_nodes_or_all_leave_them(ranks: int) -> None:
    """For nodes of 2, 4 and 8 places; near ones come first."""
    parallel = compiled(Case(Band(0), ranks, "zigzag"))
    for per_node in (2, 4, 8):
        for rank, program in enumerate(parallel.ranks()):
            for starts in by_attention(program):
                peers = [{s.kwargs["to"], s.kwargs["source"]} for s in starts]
                away = [{peer // per_node != rank // per_node for peer in pair} for pair in peers]
                near = per_node - 1
                assert away == [{False}] * near + [{True}] * (ranks - 1 - near)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 8, 9, 12, 16, 30])
def test_each_place_is_reached_once_from_each_other_one(ranks: int) -> None:
    for bases in ((ranks,), tuple(primefactors_of(ranks))):
        for turn in range(1, ranks):
            to = [reached(place, turn, bases) for place in range(ranks)]
            assert sorted(to) == list(range(ranks))
            assert [reached(place, -turn, bases) for place in to] == list(range(ranks))
        for place in range(ranks):
            others = {reached(place, turn, bases) for turn in range(1, ranks)}
            assert others == set(range(ranks)) - {place}


def primefactors_of(number: int) -> list[int]:
    for divisor in range(2, number + 1):
        if number % divisor == 0:
            return [divisor, *primefactors_of(number // divisor)]
    return []


@every_ring
def test_transfers_hide_behind_attention(ring: str) -> None:
    """Between the start of what comes and its wait, there is the attention over one other block."""
    for case, rank, program in rank_programs(ring):
        place = {node: i for i, node in enumerate(program.graph.nodes)}
        ends = {node.args[0]: place[node] for node in nodes_of(program, WAIT)}
        computed = {node: place[node] for node in attentions_of(program)}
        for starts in by_attention(program):
            first, last = place[starts[0]], place[attention_of(program, starts)]
            own = [at for at in computed.values() if first < at < last]
            assert len(own) == 1 + len(given_by(case, rank)), (case, rank)
            for start in starts:
                between = sum(place[start] < at < ends[start] for at in own)
                behind = sum(at > ends[start] for at in own)
                if start.kwargs["source"] is None:
                    assert not behind, (case, rank, start)
                else:
                    assert between == 1, (case, rank, start)


def attention_of(program: Program, starts: list[fx.Node]) -> fx.Node:
    """The node that has the name of the attention that transfers are for."""
    return next(n for n in program.graph.nodes if n.name == starts[0].kwargs["of"])


# -- blocks ----------------------------------------------------------------------------------------


def computed(program: Program) -> Counter[tuple[int, int]]:
    """How often each pair of a query chunk and a key chunk is computed, over all attentions."""
    return Counter(
        pair
        for node in attentions_of(program)
        for pair in pairs(Call(node)["queries"], Call(node)["keys"])
    )


@every_ring
def test_every_visible_block_is_computed_once(ring: str) -> None:
    for case, rank, program in rank_programs(ring):
        found, own = computed(program), chunks_of(case, rank)
        assert set(found.values()) == {NUM_ATTENTIONS}, (case, rank)
        everything = set(pairs(own, range(case.sequence.num_chunks)))
        seen = {pair for pair in everything if visible(case.band, *pair, known_chunk(case))}
        assert seen <= set(found), (case, rank)
        # One call may serve several chunks; each of its rows and columns is there for a reason.
        beyond = set(found) - seen - set(pairs(own, own))
        needed_rows, needed_columns = ({pair[i] for pair in seen} for i in (0, 1))
        assert all(q in needed_rows and k in needed_columns for q, k in beyond), (case, rank)
        assert not beyond or case.band not in (Band(), Band(0)), (case, rank)


def blocks_of(case: Case, rank: int) -> int:
    """Attention calls of one rank: its own block, and what arrives from each other one."""
    return 1 + len(given_by(case, rank))


@every_ring
def test_number_of_blocks_and_merges(ring: str) -> None:
    for case, rank, program in rank_programs(ring):
        blocks = NUM_ATTENTIONS * blocks_of(case, rank)
        assert len(attentions_of(program)) == blocks, (case, rank)
        assert len(nodes_of(program, FOLD)) == blocks - NUM_ATTENTIONS, (case, rank)
        assert len(nodes_of(program, FINISH)) == NUM_ATTENTIONS, (case, rank)


@pytest.mark.parametrize("ranks", RANKS)
def test_number_of_blocks_of_causal_attention(ranks: int) -> None:
    """Contiguous, rank r computes r + 1 blocks; zigzag evens the work out."""
    for rank in range(ranks):
        assert blocks_of(Case(Band(0), ranks, "contiguous"), rank) == rank + 1
        zigzag = Case(Band(0), ranks, "zigzag")
        assert blocks_of(zigzag, rank) == ranks
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
        assert len(attentions_of(program)) == NUM_ATTENTIONS * (2 if rank else 1)
    x = torch.randn(BATCH, 16 * 16, H)
    result = run(parallel, (x,))
    assert difference(result.outputs, captured(case.band)[0](x)) < 1e-6
    assert result.bytes_sent == [*[NUM_ATTENTIONS * 16 * TOKEN_BYTES] * 15, 0]


def test_the_first_key_of_a_window_may_be_two_chunks_away() -> None:
    """A window of one more than a chunk reaches one position further."""
    for window, blocks in ((17, 2), (18, 3)):
        case = Case(Band(0, window - 1), 16, "contiguous", length=16 * 16)
        assert blocks_of(case, 9) == blocks
        assert len(attentions_of(compiled(case).rank(9))) == NUM_ATTENTIONS * blocks


def test_one_rank_sends_nothing() -> None:
    for order in ORDERS:
        program = compiled(Case(Band(0), 1, order)).rank(0)
        assert not nodes_of(program, SHIFT)
        assert not attentions_of(program)
        assert len(nodes_of(program, "ringcompile.attention.default")) == NUM_ATTENTIONS
