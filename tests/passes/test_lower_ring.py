"""Ring attention sends what is seen and no more, overlaps it, and computes every block once.

What is needed is counted from positions by a double loop here, not by the pass's own `Route`.
"""

from __future__ import annotations

import re
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
from tests.passes.ring_cases import (
    ATTEND,
    BATCH,
    FINISH,
    FOLD,
    LENGTHS,
    LETTERS,
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


def received_by(case: Case, rank: int) -> dict[int, set[tuple[int, int]]]:
    """The chunks a rank takes in, by the direction they come from: 1 is from the rank before.

    On a ring every chunk goes as far down as its readers reach without a gap, and up to the rest;
    where all can be reached going down, they are.
    """
    found: dict[int, set[tuple[int, int]]] = {1: set(), -1: set()}
    for chunk in needed(case, rank):
        owner = chunk[0]
        distance = (rank - owner) % case.ranks
        others = range(1, case.ranks)
        readers = {d for d in others if chunk in needed(case, (owner + d) % case.ranks)}
        down = next(d for d in range(case.ranks) if d + 1 not in readers)
        found[1 if distance <= down else -1].add(chunk)
    return found


def distances(case: Case, rank: int, way: int) -> set[int]:
    """From how far the chunks come that a rank takes from one direction."""
    return {way * (rank - owner) % case.ranks for owner, _ in received_by(case, rank)[way]}


def steps_of(case: Case, rank: int) -> tuple[set[int], set[int]]:
    """The steps of one attention in which a rank passes on or takes in: down and up the ring.

    What comes from a distance of d arrives in step d - 1, and leaves its neighbour in that step.
    """
    down, up = (
        {
            d - 1
            for d in distances(case, rank, way) | distances(case, (rank + way) % case.ranks, way)
        }
        for way in (1, -1)
    )
    return down, up


def rank_programs(ring: str) -> Iterator[tuple[Case, int, Program]]:
    """Every rank of every size of a ring."""
    for case in RINGS[ring]:
        for rank, program in enumerate(compiled(case).ranks()):
            yield case, rank, program


@every_ring
def test_number_of_transfers(ring: str) -> None:
    for case, rank, program in rank_programs(ring):
        starts, waits = nodes_of(program, SHIFT), nodes_of(program, WAIT)
        expected = NUM_ATTENTIONS * sum(len(steps) for steps in steps_of(case, rank))
        assert len(starts) == len(waits) == expected, (case, rank)


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
        assert sum(map(len, steps_of(case, rank))) == transfers_by_formula(case, rank)


@every_ring
def test_transfers_are_between_neighbours(ring: str) -> None:
    for case, rank, program in rank_programs(ring):
        before, after = (rank - 1) % case.ranks, (rank + 1) % case.ranks
        for start in nodes_of(program, SHIFT):
            to, source = start.kwargs["to"], start.kwargs["source"]
            assert (to, source) != (None, None), (case, rank, start)
            down = to in (after, None) and source in (before, None)
            up = to in (before, None) and source in (after, None)
            assert down or up, (case, rank, start)


def blocks_behind(node: fx.Node) -> set[fx.Node]:
    """What arrived, or this rank's own keys or values, of which a tensor is a piece or a copy."""
    if str(node.target) in (PACK, SLICE):
        return set().union(*map(blocks_behind, node.all_input_nodes))
    return {node}


@every_ring
def test_what_is_passed_on_leaves_before_it_is_computed_with(ring: str) -> None:
    for case, rank, program in rank_programs(ring):
        order = {node: i for i, node in enumerate(program.graph.nodes)}
        first: dict[fx.Node, int] = {}
        for attention in attentions_of(program)[::-1]:
            for kv in Call(attention)["kv"]:
                first.update(dict.fromkeys(blocks_behind(kv), order[attention]))
        for start in nodes_of(program, SHIFT):
            if start.kwargs["to"] is not None:
                used = min(first[block] for block in blocks_behind(start.args[0]))  # type: ignore[arg-type]
                assert order[start] < used, (case, rank, start)


def num_exposed(case: Case, rank: int) -> int:
    """Transfers of one attention in steps for which nothing has arrived to compute with."""
    down, up = steps_of(case, rank)
    arrived = {0} | distances(case, rank, 1) | distances(case, rank, -1)
    return len(down - arrived) + len(up - arrived)


@every_ring
def test_transfers_hide_behind_attention(ring: str) -> None:
    """Every wait stands behind all attention of its step, right before what needs it."""
    for case, rank, program in rank_programs(ring):
        targets = [str(node.target) for node in program.graph.nodes]
        targets = [target for target in targets if target in LETTERS]
        steps = re.findall(r"(s{0,2})(a*)(w{0,2})", "".join(LETTERS[target] for target in targets))
        for starts, _, waits in steps:
            assert len(starts) == len(waits), (case, rank)
        exposed = sum(len(starts) for starts, attention, _ in steps if not attention)
        assert exposed == NUM_ATTENTIONS * num_exposed(case, rank), (case, rank)


def test_one_sided_bands_leave_no_transfer_exposed() -> None:
    """Of two-sided windows that go once around a small ring, some ranks wait with nothing to do."""
    exposed = {
        case.band: sum(num_exposed(case, rank) for rank in range(case.ranks))
        for ring in RINGS.values()
        for case in ring
    }
    assert [band for band in LENGTHS if band.lower == 0 and exposed[band]] == []
    assert exposed[Band()] == 0


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
    """Attention calls of one rank: its own block, and what arrives together from each other."""
    return 1 + sum(len(distances(case, rank, way)) for way in (1, -1))


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
