"""Small collectives over sockets between ranks: what `ANSWERS` says, on every rank, or an error."""

from __future__ import annotations

import multiprocessing
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from ringcompile.runtime.collectives import ANSWERS, Collective
from ringcompile.runtime.launcher import launch
from ringcompile.runtime.links import MOST_BYTES, MOST_RANKS, Links, connected_pairs
from tests.runtime import rank_functions

FLOAT = torch.float32


@contextmanager
def linked(num_ranks: int, timeout: float = 10.0) -> Iterator[list[Links]]:
    ends = connected_pairs(multiprocessing.get_context("forkserver"), num_ranks)
    made = [Links(rank, own, timeout) for rank, own in enumerate(ends)]
    try:
        yield made
    finally:
        for links in made:
            for end in links.sockets.values():
                end.close()


def drawn(kind: str, rank: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Collective:
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(shape, generator=generator).mul(9).to(dtype)
    return Collective("node", kind, "tp", x)


def meet(all_links: list[Links], brought: list[Collective], ranks: list[int]) -> list[Any]:
    with ThreadPoolExecutor(len(ranks)) as pool:
        waits = [pool.submit(all_links[rank].meet, one, ranks)
                 for rank, one in zip(ranks, brought, strict=True)]
        return [wait.result() for wait in waits]


@pytest.mark.parametrize("dtype", [FLOAT, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("ranks", [[0, 1], [2, 0], [0, 1, 2]])
@pytest.mark.parametrize("kind", ["gather", "all_reduce", "reduce_scatter", "all_to_all"])
def test_every_rank_gets_the_answer(kind: str, ranks: list[int], dtype: torch.dtype) -> None:
    shapes = [(len(ranks), 5), (len(ranks), 2, 3), (len(ranks),)]
    with linked(3) as all_links:
        for shape in shapes:
            brought = [drawn(kind, rank, dtype, shape) for rank in ranks]
            for place, found in enumerate(meet(all_links, brought, ranks)):
                expected = ANSWERS[kind](brought, place)
                torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_the_largest_message_goes_to_all_before_any_is_read() -> None:
    """Twice in a row, as far as one rank can be ahead of another."""
    with linked(2) as (one, other):
        brought = [drawn("all_reduce", rank, FLOAT, (MOST_BYTES // 4,)) for rank in (0, 1)]
        data = [b"12345678", memoryview(brought[0].tensor.numpy()).cast("B")]
        for _ in range(2):
            one._send(1, data)
        assert len(other.sockets[0].recv(4)) == 4


def test_what_goes_this_way() -> None:
    def carries(kind: str = "gather", ranks: tuple[int, ...] = (0, 1), size: int = 4) -> bool:
        asked = Collective("node", kind, "tp", torch.zeros(size, dtype=torch.uint8))
        return links.carries(asked, ranks)

    with linked(2) as (links, _):
        assert carries()
        assert carries(size=MOST_BYTES)
        assert not carries(size=0)
        assert not carries(size=MOST_BYTES + 1)
        assert not carries("dispatch")
        assert not carries("combine")
        assert not carries(ranks=(0, 2))
    assert not any(connected_pairs(multiprocessing.get_context("forkserver"), MOST_RANKS + 1))


OTHERS = [
    Collective("node", "gather", "tp", torch.zeros(4)),
    Collective("another", "all_reduce", "tp", torch.zeros(4)),
    Collective("node", "all_reduce", "tp", torch.zeros(3)),
    Collective("node", "all_reduce", "tp", torch.zeros(4), "along dim 1"),
]


@pytest.mark.parametrize("other", OTHERS, ids=["kind", "node", "size", "dims"])
def test_ranks_in_different_exchanges_are_told(other: Collective) -> None:
    mine = Collective("node", "all_reduce", "tp", torch.zeros(4))
    with linked(2) as all_links, pytest.raises(RuntimeError, match=r"is in another exchange$"):
        meet(all_links, [mine, other], [0, 1])


def test_a_rank_that_does_not_come() -> None:
    asked = drawn("all_reduce", 0, FLOAT, (4,))
    with linked(2, timeout=0.2) as (one, other):
        with pytest.raises(RuntimeError, match=r"^rank 1 did not answer in time$"):
            one.meet(asked, [0, 1])
        other.sockets[0].close()
        with pytest.raises(RuntimeError, match=r"rank 1 is lost: Broken pipe$"):
            one.meet(asked, [0, 1])
    with linked(2) as (one, other):
        other._send(0, [b"1234"])
        other.sockets[0].close()
        with pytest.raises(RuntimeError, match=r"^connection closed by rank 1$"):
            one._receive(1, b"12345678", memoryview(bytearray(4)))


def test_programs_small_collectives_go_this_way_and_large_ones_do_not() -> None:
    """Where gloo's collectives fail, only large ones do."""
    for found in launch(rank_functions.meet_without_gloo, 2, (MOST_BYTES,)):
        small, large = found
        assert small == 3.0
        assert re.search("gloo was asked", large)
