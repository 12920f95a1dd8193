"""Linear attention over ranks and from call to call: a state travels and is kept, no tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ringcompile as rc
from ringcompile.ir.communication import bytes_sent
from ringcompile.ir.expr import BATCH, bind, product
from ringcompile.ir.nodes import type_of
from ringcompile.ir.types import local_shape
from tests.generate.models import Rotary, cached, checked_session, difference, ids
from tests.support import some_fast

WIDTH, HEADS, SIZE, FEATURES, EXACT = 8, 2, 3, 5, 1e-10


class Mixing(nn.Module):
    """Heads that read states, whose decays tokens choose."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.read, self.enter = nn.Linear(width, HEADS * SIZE), nn.Linear(width, HEADS * SIZE)
        self.value, self.gate = nn.Linear(width, HEADS * FEATURES), nn.Linear(width, HEADS)
        self.leave = nn.Linear(HEADS * FEATURES, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v, gate = (
            layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for layer in (self.read, self.enter, self.value, self.gate)
        )
        # Every so often all is forgotten.
        decay = F.logsigmoid(3 * gate).masked_fill(gate > 0.9, -torch.inf).squeeze(-1)
        return self.leave(rc.linear_attention(q, k, v, decay).transpose(1, 2).flatten(2))


def check(spec: str, lengths: tuple[int, ...], order: str = "auto") -> int:
    """The bytes of all ranks for one sequence."""
    torch.manual_seed(0)
    model = Mixing(WIDTH).double().eval()
    program = rc.capture(model, (torch.randn(2, 12, WIDTH, dtype=torch.float64),))
    parallel = rc.transform(program, spec, order=order)
    for length in lengths:
        x = torch.randn(2, length, WIDTH, dtype=torch.float64)
        torch.testing.assert_close(rc.run(parallel, (x,)), model(x), rtol=EXACT, atol=EXACT)
    sent = sum(bytes_sent(parallel.rank(rank)) for rank in range(parallel.world_size))
    return bind(sent, {BATCH: 1})


@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
def test_a_state_and_a_decay_of_each_chunk_travel(order: str) -> None:
    chunks = 8 if order == "zigzag" else 4
    numbers = HEADS * (SIZE * FEATURES + 1)
    assert check("ring=4", (24, 13, 1, 300), order) == chunks * 3 * numbers * 8


@pytest.mark.parametrize(
    "spec",
    some_fast(("time=2", "ring=2,time=2", "ring=2,tp=2", "ring=2,ulysses=2", "dp=2", "tp=2"),
              fast=lambda spec: spec in ("ring=2,time=2", "ring=2,tp=2")),
)
def test_beside_other_axes(spec: str) -> None:
    check(spec, (17, 2))


class Generating(Rotary):
    """Embeddings that states are mixed into, and attention behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.mixing = Mixing(self.embed.embedding_dim)

    def entered(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        return x + self.mixing(x)


@pytest.mark.parametrize(
    "spec", some_fast(("ring=2,tp=2", "pp=2", "ulysses=2"), fast=lambda spec: spec[0] == "r")
)
@torch.no_grad()
def test_a_cache_keeps_states_at_the_starts_of_blocks(spec: str) -> None:
    module, parallel = cached(Generating, spec, batch=2)
    tokens = ids(80, batch=2)
    expected = module(tokens)
    with checked_session(parallel) as session:
        for new in (1, 6, 1, 40, 2):
            now = slice(session.length, session.length + new)
            assert difference(session.extend(tokens[:, now]), expected[:, now]) < EXACT
        session.rewind(18)
        assert difference(session.extend(tokens[:, 18:70]), expected[:, 18:70]) < EXACT
        with pytest.raises(rc.RingCompileError, match="only the last 32 tokens is kept"):
            session.rewind(37)
        session.reset()
        assert difference(session.extend(tokens[:, :3]), expected[:, :3]) < EXACT


def test_what_is_kept_is_three_states_and_64_tokens() -> None:
    _, parallel = cached(Generating, "tp=2", batch=2)
    assert parallel.carried is not None
    program = parallel.carried.rank(0)
    kept = [
        type_of(node) for node in program.graph.nodes if program.state.get(node.name) == "recent"
    ]
    heads = HEADS // 2
    shapes = [local_shape(type_, program.mesh, program.sequence) for type_ in kept]
    numbers = sum(bind(product(shape), {BATCH: 1}) for shape in shapes)
    assert numbers == heads * (3 * SIZE * FEATURES + 64 * (SIZE + FEATURES + 1))


@pytest.mark.parametrize(("sizes", "text"), [
    ([(2, 7, 3), (2, 7, 4), (2, 7, 5), (2, 7)], "linear attention of q (2, 7, 3), k (2, 7, 4)"),
    ([(2, 7, 3), (2, 7, 3), (2, 6, 5), (2, 7)], "v (2, 6, 5) and decay (2, 7)"),
    ([(7, 3), (7, 3), (5,), (7,)], "v (5,) and decay (7,)"),
    ([(2, 7, 3), (2, 7, 3), (3, 7, 5), (7,)], "v (3, 7, 5) and decay (7,) do not broadcast"),
])
def test_sizes_that_do_not_belong_together_are_refused(sizes: list[Any], text: str) -> None:
    with pytest.raises(rc.RingCompileError) as refused:
        rc.linear_attention(*map(torch.ones, sizes))
    assert text in str(refused.value)


def test_heads_and_sequences_broadcast() -> None:
    q, k, v = (torch.randn(*outer, 7, 3) for outer in ((2, 4), (1, 1), (4,)))
    decay = -torch.rand(4, 1).expand(4, 7)
    found = rc.linear_attention(q, k, v, decay)
    each = rc.linear_attention(q[1, 2], k[0, 0], v[2], decay[2])
    torch.testing.assert_close(found[1, 2], each)
